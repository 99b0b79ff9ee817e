// Where a pump is refused memory, whenever that is, the job ends with that, and the next one works.
#include <sys/prctl.h>

#include <atomic>
#include <new>

#include "cuda.hpp"

extern "C" char __executable_start, etext;

namespace {

std::atomic<int64_t> refused{0}; // the allocation, counted from 1, that is refused; 0: none
std::atomic<int64_t> asked{0};

bool is_pump() {
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    return strncmp(name, "kvf-save", 8) == 0 || strncmp(name, "kvf-load", 8) == 0;
}

// Of the library, which this program contains; the simulated driver, outside of it, is spared.
bool is_refused(const void *caller) {
    if (!refused || caller < &__executable_start || caller >= &etext || !is_pump()) return false;
    return ++asked == refused;
}

} // namespace

void *operator new(size_t bytes) {
    if (is_refused(__builtin_return_address(0))) throw std::bad_alloc();
    if (void *memory = malloc(bytes ? bytes : 1)) return memory;
    throw std::bad_alloc();
}
void operator delete(void *memory) noexcept { free(memory); }
void operator delete(void *memory, size_t) noexcept { free(memory); }

int main() {
    need_simulation();
    Random random(22);
    const uint64_t room = 6 * MiB;
    const Context context;
    const DeviceMemory device(random_bytes(random, room));
    const Plan plan = make_plan(random, Style::Mixed, room);
    const Regions regions = plan.at(device.address());
    bool all_asked = false;
    for (int64_t nth = 1; !all_asked; ++nth) {
        CHECK(nth < 2000);
        Engine engine;
        const Buffer buffer(engine, Kind::Pageable, plan.buffer_bytes);
        asked = 0;
        refused = nth;
        for (const Way way : {Way::Save, Way::Load}) {
            const kvf_completion completion = finish(start(engine, way, regions, buffer));
            CHECK(completion.status == KVF_OK || completion.status == KVF_ERR_OUT_OF_MEMORY);
        }
        all_asked = asked < nth;
        refused = 0;
        succeed(start(engine, Way::Save, regions, buffer));
        succeed(start(engine, Way::Load, regions, buffer));
    }
    return 0;
}
