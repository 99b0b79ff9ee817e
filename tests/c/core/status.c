/* The status table: numbers, names and texts agree, and no number says two things. */
#include <ctype.h>

#include "check.h"

int main(void) {
    static const struct {
        int32_t status;
        const char *name, *text;
    } table[] = {
#define ENTRY(name, value, text) {value, "KVF_" #name, text},
        KVF_STATUS_MAP(ENTRY)
#undef ENTRY
    };
    const int count = (int)(sizeof table / sizeof table[0]);
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
