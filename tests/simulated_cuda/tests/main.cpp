// Runs the tests of one program. Each is a function that is named after one behaviour.
//
//   test_simulated_SUBJECT gather.ptx                  all tests, on the simulated driver
//   test_simulated_SUBJECT gather.ptx libcuda.so.1     on a real driver: what it must do as well
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "driver_test.h"

Api cuda;
std::string ptx;

namespace {

int failures = 0;

void load_api(const char *library, bool simulated) {
    // A real driver must not find its own functions in the simulated driver, which this program
    // links.
    void *handle = dlopen(library, RTLD_NOW | (simulated ? 0 : RTLD_DEEPBIND));
    if (!handle) {
        std::printf("%s\n", dlerror());
        std::exit(1);
    }
#define LOAD(name, symbol, parameters)                                                             \
    cuda.name = reinterpret_cast<CUresult(*) parameters>(dlsym(handle, #symbol));
    CUDA_DRIVER_ENTRY_POINTS(LOAD)
#undef LOAD
#define REQUIRE(name, symbol, parameters)                                                          \
    if (!cuda.name) std::printf("no %s in %s\n", #symbol, library), std::exit(1);
    CUDA_DRIVER_REQUIRED(REQUIRE)
#undef REQUIRE
}

void run(const Test &test) {
    const int before = failures;
    test.run();
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
}

void check_nothing_is_left() {
    const uint64_t live = kvfsim_count("live");
    if (live == 0) return;
    std::printf("  %llu objects leaked\n", static_cast<unsigned long long>(live));
    ++failures;
}

} // namespace

void check(bool good, const char *what, const char *file, int line) {
    if (good) return;
    std::printf("  %s:%d: %s\n", file, line, what);
    ++failures;
}

void check_result(CUresult got, CUresult wanted, const char *what, const char *file, int line) {
    if (got == wanted) return;
    std::printf("  %s:%d: %s: %d instead of %d\n", file, line, what, static_cast<int>(got),
                static_cast<int>(wanted));
    ++failures;
}

Session::Session(int device) : device(device) {
    OK(cuda.cuDevicePrimaryCtxRetain(&context, device));
    OK(cuda.cuCtxPushCurrent(context));
    OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
}

Session::~Session() {
    cuda.cuStreamDestroy(stream);
    OK(cuda.cuCtxPopCurrent(nullptr));
    OK(cuda.cuDevicePrimaryCtxRelease(device));
}

Bytes random_bytes(size_t size) {
    static std::mt19937_64 engine(7);
    Bytes bytes(size);
    for (auto &byte : bytes) byte = static_cast<unsigned char>(engine());
    return bytes;
}

CUdeviceptr allocate(size_t bytes) {
    CUdeviceptr address = 0;
    OK(cuda.cuMemAlloc(&address, bytes));
    return address;
}

unsigned char *allocate_host(size_t bytes) {
    void *address = nullptr;
    OK(cuda.cuMemHostAlloc(&address, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP));
    return static_cast<unsigned char *>(address);
}

CUdeviceptr as_device(const void *host) { return reinterpret_cast<CUdeviceptr>(host); }

void upload(const Session &session, CUdeviceptr to, const Bytes &from) {
    OK(cuda.cuMemcpyHtoDAsync(to, from.data(), from.size(), session.stream));
    OK(cuda.cuStreamSynchronize(session.stream));
}

Bytes download(const Session &session, CUdeviceptr from, size_t size) {
    Bytes to(size);
    OK(cuda.cuMemcpyDtoHAsync(to.data(), from, size, session.stream));
    OK(cuda.cuStreamSynchronize(session.stream));
    return to;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        std::printf("usage: %s gather.ptx [library of a real driver]\n", argv[0]);
        return 2;
    }
    std::ifstream file(argv[1]);
    ptx.assign(std::istreambuf_iterator<char>(file), {});
    const bool simulated = argc < 3;
    Dl_info self{};
    dladdr(reinterpret_cast<void *>(&kvfsim_reset), &self);
    load_api(simulated ? self.dli_fname : argv[2], simulated);
    int version = 0;
    RETURNS(CUDA_ERROR_NOT_INITIALIZED, cuda.cuDeviceGetCount(&version));
    OK(cuda.cuInit(0));

    for (const Test &test : kAnyDriver) run(test);
    if (!simulated) return failures != 0;
    check_nothing_is_left();
    CHECK(kvfsim_count("abandoned") == 0);
    CHECK(kvfsim_count("hazards") == 0);
    CHECK(kvfsim_count("nothing") == UINT64_MAX);
    for (const Test &test : kSimulatedOnly) {
        kvfsim_reset();
        run(test);
        check_nothing_is_left();
    }
    return failures != 0;
}
