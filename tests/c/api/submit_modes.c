/* A mode of a save is refused by a load, and the other way round; regions have no mode. */
#include "check.h"

static char error[128];
static char byte, to;

/* No attachment is needed: options are looked at first. */
static const kvf_llama none = 0;

static kvf_submit_options with_mode(uint32_t mode) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.mode = mode;
    options.error = error;
    options.error_size = sizeof error;
    error[0] = 0;
    return options;
}

static int32_t save(uint32_t mode) {
    const kvf_submit_options options = with_mode(mode);
    return kvf_llama_save(none, 0, &to, 1, &options, NULL);
}

static int32_t load(uint32_t mode) {
    const kvf_submit_options options = with_mode(mode);
    return kvf_llama_load(none, 0, &byte, 1, &options, NULL);
}

int main(void) {
    const uint32_t of_saves[] = {KVF_SAVE_IN_PLACE, KVF_SAVE_SNAPSHOT};
    const uint32_t of_loads[] = {KVF_LOAD_IN_PLACE, KVF_LOAD_AHEAD};
    for (int i = 0; i < 2; ++i) {
        CHECK_STATUS(KVF_ERR_INVALID_HANDLE, save(of_saves[i]));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, load(of_saves[i]));
        CHECK(strstr(error, "mode of a load"));
        CHECK_STATUS(KVF_ERR_INVALID_HANDLE, load(of_loads[i]));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, save(of_loads[i]));
        CHECK(strstr(error, "mode of a save"));
        for (int j = 0; j < 2; ++j) CHECK(of_saves[i] != of_loads[j]);
    }
    /* A struct of zeros means the default of either. */
    CHECK(KVF_SAVE_AUTO == 0 && KVF_LOAD_AUTO == 0);
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, save(0));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, load(0));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, save(3));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, load(UINT32_MAX));

    const kvf_engine engine = make_engine();
    const kvf_region region = plain_region(&byte, 1, 0);
    const uint32_t modes[] = {KVF_SAVE_IN_PLACE, KVF_LOAD_IN_PLACE};
    for (int i = 0; i < 2; ++i) {
        const kvf_submit_options options = with_mode(modes[i]);
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                     kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
        CHECK(strstr(error, "no mode"));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                     kvf_regions_load(engine, &region, 1, &to, 1, &options, NULL));
    }
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
