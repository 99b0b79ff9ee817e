#include "engine/locator.h"

namespace kvf {

bool Locator::on_cuda(uint64_t address, uint32_t &device) {
    if (address >= known_.begin && address < known_.end) {
        device = known_device_;
        return true;
    }
    const auto allocation = find_allocation(usable(contexts_), address);
    if (!allocation) return false;
    for (size_t i = 0; i < contexts_.size(); ++i) {
        if (contexts_[i]->ordinal() != allocation->ordinal) continue;
        known_ = *allocation;
        device = known_device_ = static_cast<uint32_t>(i + 1); // after the host
        return true;
    }
    throw Error(KVF_ERR_UNREACHABLE,
                format("CUDA device %d is not among the engine's", allocation->ordinal));
}

// A driver refuses a copy from one allocation into another. What it does with a copy across
// addresses that nothing is mapped to is not documented. Called when on_cuda() has just found the
// last byte of the range.
uint64_t Locator::allocation_of(uint64_t address, uint64_t bytes) {
    if (address < known_.begin) return address; // several allocations, or the driver does not tell
    if (known_.in_one_piece) return known_.begin;
    // Between neighbours there is no hole: they may be joined to one run, but not to rows with a
    // pitch.
    if (address != neighbours_end_ || address == known_.begin) neighbours_begin_ = address;
    neighbours_end_ = address + bytes;
    return neighbours_begin_;
}

Location Locator::operator()(uint64_t address, uint64_t bytes) {
    uint32_t first = Device::kHost, last = Device::kHost;
    if (!contexts_.empty() && on_cuda(address, first)) {
        // A range that is mapped from several allocations begins and ends in different ones.
        if (on_cuda(address + bytes - 1, last) && last == first) {
            return {first, allocation_of(address, bytes)};
        }
        throw Error(KVF_ERR_UNREACHABLE,
                    format("the range at 0x%llx reaches beyond the device's memory",
                           static_cast<unsigned long long>(address)));
    }
    if (mapped_(address, bytes)) return {Device::kHost, 0};
    throw Error(KVF_ERR_UNREACHABLE, format("address 0x%llx cannot be read by this process",
                                            static_cast<unsigned long long>(address)));
}

} // namespace kvf
