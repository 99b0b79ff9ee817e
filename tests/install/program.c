/* Saves a few bytes with an installed kvferry. */
#include <kvferry.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    static const char from[] = "moved";
    char to[sizeof from] = "";
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    kvf_engine engine;
    if (kvf_engine_create(&options, &engine) != KVF_OK) return 1;
    const kvf_region region = {(uintptr_t)from, sizeof from, 1, 0, 0, 0};
    kvf_job job;
    if (kvf_regions_save(engine, &region, 1, to, sizeof to, NULL, &job) != KVF_OK) return 1;
    kvf_completion completion;
    if (kvf_job_wait(job, KVF_FOREVER, &completion, sizeof completion) != KVF_OK) return 1;
    if (kvf_job_release(job) != KVF_OK || kvf_engine_destroy(engine) != KVF_OK) return 1;
    printf("kvferry %s: %s\n", kvf_version(), kvf_strerror(completion.status));
    return strcmp(from, to) != 0 || kvf_abi_version() != KVF_ABI_VERSION;
}
