/* The engine's description: a caller asks for its length first, then for the text. */
#include "check.h"

int main(void) {
    const kvf_engine engine = make_engine();
    uint64_t needed = 0;
    CHECK_STATUS(KVF_ERR_BUFFER_TOO_SMALL, kvf_engine_describe(engine, NULL, 0, &needed));
    CHECK(needed > 2 && needed < 65536);
    char *json = malloc(needed);
    CHECK(json);
    memset(json, 'x', needed);
    CHECK_STATUS(KVF_ERR_BUFFER_TOO_SMALL, kvf_engine_describe(engine, json, needed - 1, NULL));
    CHECK(strlen(json) == needed - 2); /* cut, and terminated */
    CHECK_OK(kvf_engine_describe(engine, json, needed, &needed));
    CHECK(strlen(json) == needed - 1);
    CHECK(json[0] == '{' && json[needed - 2] == '}');
    CHECK(strstr(json, "\"jobs_in_flight\": 0") && strstr(json, "\"devices\": ["));
    CHECK(strstr(json, "\"kind\": \"host\""));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_describe(engine, NULL, 10, NULL));
    free(json);
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
