// Rows of one width at one pitch, tensor after tensor with libllama's few bytes between them, at
// any place of the buffer and while they are still being recorded: urgent loads take them through
// staging without a table, whole lines of the host at a time, and nothing beside them is touched.
#include "inside.hpp"

namespace {

struct Tensors {
    uint64_t width, rows, count;
    std::vector<uint64_t> gaps; // in the buffer, before each

    uint64_t pitch() const { return 4 * width; }
    uint64_t device_bytes() const { return count * rows * pitch(); }
    uint64_t address(uint64_t tensor) const { return tensor * rows * pitch(); }
    uint64_t offset(uint64_t tensor) const {
        uint64_t offset = 0;
        for (uint64_t i = 0; i <= tensor; ++i) offset += gaps[i % gaps.size()];
        return offset + tensor * rows * width;
    }
    uint64_t buffer_bytes() const { return offset(count - 1) + rows * width; }

    kvf::Layout layout(uint64_t address, uint64_t tensor) const {
        kvf::LayoutBuilder builder;
        for (uint64_t row = 0; row < rows; ++row) {
            builder.add(address + this->address(tensor) + row * pitch(),
                        offset(tensor) + row * width, width);
        }
        return builder.finish();
    }
    void model(Way way, Bytes &memory, Bytes &buffer) const {
        for (uint64_t i = 0; i < count * rows; ++i) {
            unsigned char *m = &memory[address(i / rows) + i % rows * pitch()];
            unsigned char *b = &buffer[offset(i / rows) + i % rows * width];
            way == Way::Save ? std::copy_n(m, width, b) : std::copy_n(b, width, m);
        }
    }
};

// With all but the first `early` tensors recorded while those are being moved.
void move(const std::shared_ptr<kvf::Engine> &engine, Way way, const Tensors &tensors,
          uint64_t address, unsigned char *buffer, uint32_t priority, uint64_t early) {
    kvf::OpenJob open(*engine, make_submission(way, buffer, tensors.buffer_bytes()),
                      options_of(priority), false);
    for (uint64_t tensor = 0; tensor < tensors.count; ++tensor) {
        if (tensor == early) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        open.add(1, tensors.layout(address, tensor));
    }
    const std::shared_ptr<kvf::Job> job = open.job();
    open.commit({}, nullptr);
    succeed(job);
}

} // namespace

int main() {
    Random random(31);
    const Context context;
    const Holdings holdings;
    auto engine = make_cuda_engine();
    const bool simulated = driver().simulated();
    const auto counted = [&](const char *what) { return simulated ? driver().count(what) : 0; };
    // The first are more than a piece, so that one begins in the middle of a tensor.
    for (const Tensors &tensors :
         {Tensors{2048, 1000, 8, {12}}, Tensors{2048, 600, 5, {268, 12, 4, 5000}},
          Tensors{1028, 600, 4, {0}}, Tensors{4096, 400, 3, {4096}},
          Tensors{4100, 400, 3, {1, 3}}}) {
        const DeviceMemory device(tensors.device_bytes());
        const uint64_t bytes = tensors.count * tensors.rows * tensors.width;
        for (const uint64_t shift : {0, 4, 252}) {
            auto *pinned = static_cast<unsigned char *>(
                engine->pool().alloc(shift + tensors.buffer_bytes() + 64));
            unsigned char *buffer = pinned + shift;
            for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
                Bytes memory = random_bytes(random, tensors.device_bytes());
                Bytes expected = random_bytes(random, tensors.buffer_bytes() + 64);
                std::copy(expected.begin(), expected.end(), buffer);
                device.write(memory);
                tensors.model(Way::Load, memory, expected);
                const uint64_t loaded = counted("bytes_load"), kernels = counted("kernels");
                move(engine, Way::Load, tensors, device.address(), buffer, priority, 1);
                CHECK(device.read() == memory);
                CHECK(std::equal(expected.begin(), expected.end(), buffer));
                // No tables, and little beside the bytes themselves.
                CHECK(!simulated || counted("bytes_load") - loaded <= bytes + 512 * tensors.count);
                const bool staged = priority == KVF_PRIORITY_URGENT &&
                                    (tensors.width % 256 || shift || tensors.gaps[0] % 256);
                CHECK(!simulated || (counted("kernels") > kernels) == staged);

                std::fill_n(buffer, expected.size(), 0xAA);
                std::fill(expected.begin(), expected.end(), 0xAA);
                tensors.model(Way::Save, memory, expected);
                move(engine, Way::Save, tensors, device.address(), buffer, priority, 2);
                CHECK(std::equal(expected.begin(), expected.end(), buffer));
            }
            kvf_buffer_free(pinned);
        }
    }
    engine->close();
    engine.reset();
    holdings.check_same();
    return 0;
}
