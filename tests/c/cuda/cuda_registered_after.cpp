// A registered range can be unregistered when its engine is gone.
#include "cuda.hpp"

int main() {
    const Context context;
    const Holdings holdings;
    static unsigned char memory[3 * MiB], other[4096];
    kvf_engine gone;
    {
        Engine engine;
        gone = engine;
        CHECK_OK(kvf_buffer_register(engine, memory, sizeof memory));
    }
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_buffer_unregister(gone, other));
    CHECK_OK(kvf_buffer_unregister(gone, memory));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_buffer_unregister(gone, memory));
    holdings.check_same();
    return 0;
}
