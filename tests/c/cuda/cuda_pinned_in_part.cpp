// Memory of which only the beginning and the end are pinned counts as pageable, and so does what
// was pinned in several pieces, with or without a gap between them: a driver refuses copies across
// pieces.
#include "cuda.hpp"

int main() {
    Random random(27);
    const uint64_t piece = MiB, bytes = 3 * piece;
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const Bytes content = random_bytes(random, bytes);
        const DeviceMemory device(content);
        const Buffer buffer(engine, Kind::Pageable, bytes);
        const auto pin = [&](uint64_t at) {
            CHECK_CUDA(
                driver().cuMemHostRegister(buffer.data() + at, piece, CU_MEMHOSTREGISTER_PORTABLE));
        };
        const auto save = [&] {
            buffer.fill(0);
            succeed(start(engine, Way::Save, {{device.address(), bytes, 1, 0, 0, 0}}, buffer));
            CHECK(buffer.holds(content));
            // Pageable memory goes through a bounce buffer.
            const bool bounced = !engine.describes("\"pinned_bytes\": 0,");
            CHECK_OK(kvf_buffer_trim(engine));
            return bounced;
        };
        pin(0);
        pin(2 * piece);
        CHECK(save());
        pin(piece);
        CHECK(save());
        for (uint64_t at = 0; at < bytes; at += piece) {
            CHECK_CUDA(driver().cuMemHostUnregister(buffer.data() + at));
        }
        CHECK_CUDA(driver().cuMemHostRegister(buffer.data(), bytes, CU_MEMHOSTREGISTER_PORTABLE));
        CHECK(!save());
        CHECK_CUDA(driver().cuMemHostUnregister(buffer.data()));
        CHECK(save());
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
