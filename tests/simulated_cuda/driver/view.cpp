#include "view.h"

#include <algorithm>
#include <cstring>

#include "allocations.h"

namespace simulated {

View::View() {
    parts_.reserve(driver().allocations.size());
    for (const auto &[address, allocation] : driver().allocations)
        parts_.push_back(
            {allocation.range, allocation.on_device ? allocation.context->device : -1});
}

const View::Part *View::find(uint64_t address, uint64_t bytes) {
    if (!recent_ || !recent_->range.holds(address, bytes)) {
        auto it =
            std::upper_bound(parts_.begin(), parts_.end(), address,
                             [](uint64_t a, const Part &part) { return a < part.range.address; });
        if (it == parts_.begin() || !std::prev(it)->range.holds(address, bytes)) return nullptr;
        recent_ = &*std::prev(it);
    }
    return recent_;
}

std::byte *View::device(uint64_t address, uint64_t bytes, int device) {
    const Part *part = find(address, bytes);
    if (!part || part->device < 0 || (device >= 0 && part->device != device)) return nullptr;
    return alias_of(address);
}

std::byte *View::kernel(uint64_t address, uint64_t bytes, int on_device) {
    const Part *part = find(address, bytes);
    if (!part) return nullptr;
    if (part->device >= 0) return device(address, bytes, on_device);
    return is_mapped({address, bytes}) ? reinterpret_cast<std::byte *>(address) : nullptr;
}

std::byte *View::any(uint64_t address, uint64_t bytes) {
    if (arena_of(address)) return device(address, bytes, -1);
    return is_mapped({address, bytes}) ? reinterpret_cast<std::byte *>(address) : nullptr;
}

} // namespace simulated

using namespace simulated;

extern "C" {

int kvfsim_write(uint64_t address, const void *from, uint64_t bytes) {
    Lock lock(driver().mutex);
    std::byte *to = View().device(address, bytes, -1);
    if (!to) return -1;
    std::memcpy(to, from, bytes);
    return 0;
}

int kvfsim_read(void *to, uint64_t address, uint64_t bytes) {
    Lock lock(driver().mutex);
    const std::byte *from = View().device(address, bytes, -1);
    if (!from) return -1;
    std::memcpy(to, from, bytes);
    return 0;
}

} // extern "C"
