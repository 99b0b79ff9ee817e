#include "memory/buffer_checks.h"

#include "memory/pages.h"

namespace kvf {

void check_room(uint64_t needed, uint64_t given) {
    if (given >= needed) return;
    throw Error(KVF_ERR_BUFFER_TOO_SMALL, format("%llu bytes are needed, %llu were given",
                                                 static_cast<unsigned long long>(needed),
                                                 static_cast<unsigned long long>(given)));
}

void check_accessible(Direction direction, const void *buffer, uint64_t bytes) {
    const auto address = reinterpret_cast<uint64_t>(buffer);
    if (!MappedCheck()(address, bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffer is not mapped memory");
    }
    if (direction == Direction::Save && !WritableCheck()(address, bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffer cannot be written");
    }
}

} // namespace kvf
