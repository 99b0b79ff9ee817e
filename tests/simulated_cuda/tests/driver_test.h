// What the tests of the simulated driver share: the driver's functions, checks, and what most tests
// need of a device.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/driver_api.h"
#include "simulated_cuda.h"

// ---- The tests of a program ---------------------------------------------------------------------

struct Test {
    const char *name;
    void (*run)();
};
#define TEST(function)                                                                             \
    Test { #function, function }

// Each program defines two lists of tests: what a real driver does too, and what only the simulated
// driver can show. kvfsim_reset() is called before each test of the second list.
extern const std::vector<Test> kAnyDriver;
extern const std::vector<Test> kSimulatedOnly;

// ---- The driver's functions ---------------------------------------------------------------------

struct Api {
#define MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    CUDA_DRIVER_ENTRY_POINTS(MEMBER)
#undef MEMBER
};
extern Api cuda;
// The text of gather.ptx.
extern std::string ptx;

// ---- Checks -------------------------------------------------------------------------------------

// A check that does not hold is printed, and the program fails at its end.
void check(bool good, const char *what, const char *file, int line);
void check_result(CUresult got, CUresult wanted, const char *what, const char *file, int line);
#define CHECK(...) check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define OK(...) check_result((__VA_ARGS__), CUDA_SUCCESS, #__VA_ARGS__, __FILE__, __LINE__)
#define RETURNS(wanted, ...) check_result((__VA_ARGS__), wanted, #__VA_ARGS__, __FILE__, __LINE__)

// ---- A device and its memory --------------------------------------------------------------------

// A device's primary context, retained and current on the calling thread, and a stream. The
// destructor releases both.
struct Session {
    int device;
    CUcontext context = nullptr;
    CUstream stream = nullptr;

    explicit Session(int device = 0);
    ~Session();
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;
};

using Bytes = std::vector<unsigned char>;

Bytes random_bytes(size_t size);

// Allocates device memory, which the caller frees with cuMemFree().
CUdeviceptr allocate(size_t bytes);
// Allocates pinned host memory, which the caller frees with cuMemFreeHost().
unsigned char *allocate_host(size_t bytes);

// Returns a host address as an address for calls that take either.
CUdeviceptr as_device(const void *host);

// Copies to a device or from there, and waits for the copy.
void upload(const Session &session, CUdeviceptr to, const Bytes &from);
Bytes download(const Session &session, CUdeviceptr from, size_t size);
