// A submission with a callback that comes as its engine is being destroyed, or has been, is
// refused, and starts no thread.
#include "engine/open_job.h"

#include <cstdlib>

#include "check.h"

namespace {

int32_t submit_with_callback(kvf::Engine &engine) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.callback = [](const kvf_completion *) {};
    try {
        kvf::submit_job(engine, {}, {}, options, nullptr);
    } catch (const kvf::Error &error) {
        return error.status;
    }
    return KVF_OK;
}

} // namespace

int main() {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    for (const bool has_dispatched : {false, true}) {
        const auto engine = std::make_shared<kvf::Engine>(options);
        if (has_dispatched) CHECK_OK(submit_with_callback(*engine));
        engine->close();
        // Another thread may have found the engine before it went.
        CHECK_STATUS(KVF_ERR_CLOSED, submit_with_callback(*engine));
    }
    return 0;
}
