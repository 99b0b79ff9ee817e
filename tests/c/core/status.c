/* The library knows every status of the header, with the text that stands there, and no other; and
 * no number says two things.
 *     test_status KVFERRY.H */
#include <ctype.h>

#include "check.h"

enum { MOST = 100 };

static struct {
    int32_t status;
    char name[40], text[80];
} table[MOST];

/* Reads lines like "    KVF_ERR_BUSY = -7, // text", with the comment in C's form. */
static int read_table(const char *header) {
    FILE *file = fopen(header, "r");
    CHECK(file);
    int count = 0;
    char line[200];
    while (fgets(line, sizeof line, file)) {
        int32_t number;
        char name[40], text[80];
        if (sscanf(line, " %39[A-Z_] = %d, /* %79[^*]", name, &number, text) != 3) continue;
        if (strcmp(name, "KVF_OK") != 0 && strncmp(name, "KVF_ERR_", 8) != 0) continue;
        CHECK(count < MOST);
        text[strlen(text) - 1] = 0; /* the space before the comment's end */
        table[count].status = number;
        strcpy(table[count].name, name);
        strcpy(table[count++].text, text);
    }
    CHECK(fclose(file) == 0);
    return count;
}

int main(int arguments, char **argument) {
    CHECK(arguments == 2);
    const int count = read_table(argument[1]);
    CHECK(count >= 29);
    int known = 0;
    for (int32_t number = -1000; number <= 1000; ++number) {
        known += strcmp(kvf_status_name(number), "KVF_?") != 0;
    }
    CHECK(known == count);
    for (int i = 0; i < count; ++i) {
        CHECK(strcmp(kvf_status_name(table[i].status), table[i].name) == 0);
        CHECK(strcmp(kvf_strerror(table[i].status), table[i].text) == 0);
        CHECK(i == 0 ? table[i].status == KVF_OK : table[i].status < 0);
        const char *text = table[i].text;
        CHECK(text[0] && text[strlen(text) - 1] != '.');
        CHECK(islower((unsigned char)text[0]) || strncmp(text, "libllama", 8) == 0);
        for (int j = 0; j < i; ++j) {
            CHECK(table[i].status != table[j].status);
            CHECK(strcmp(table[i].text, table[j].text) != 0);
        }
    }
    /* Released numbers: part of the ABI, written down here a second time on purpose. */
    CHECK(KVF_ERR_INVALID_ARGUMENT == -1 && KVF_ERR_BUSY == -7 && KVF_ERR_CANCELLED == -9);
    CHECK(KVF_ERR_FORKED == -11 && KVF_ERR_SYSTEM == -17 && KVF_ERR_STATE_DAMAGED == -24);
    CHECK(KVF_ERR_INTERNAL == -28);

    const int32_t unknown[] = {1, -1000, INT32_MIN, INT32_MAX};
    for (int i = 0; i < 4; ++i) {
        CHECK(strcmp(kvf_status_name(unknown[i]), "KVF_?") == 0);
        CHECK(kvf_strerror(unknown[i])[0]);
    }

    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", KVF_VERSION_MAJOR, KVF_VERSION_MINOR,
             KVF_VERSION_PATCH);
    CHECK(strcmp(kvf_version(), version) == 0);
    CHECK(kvf_abi_version() == KVF_ABI_VERSION);
    return 0;
}
