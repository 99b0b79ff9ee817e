// Modules, and the kernels that gather and scatter rows.
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

// Memory and staging with random bytes, on the device and here; and what kernels should make of
// them, which gather rows, and scatter them into memory that holds other bytes.
class Moved {
public:
    Moved(const Session &s, uint64_t memory_bytes, uint64_t staging_bytes)
        : s_(s), memory_(random_bytes(memory_bytes)), other_memory_(random_bytes(memory_bytes)),
          device_memory_(allocate(memory_bytes)), device_staging_(allocate(staging_bytes)),
          wanted_memory_(other_memory_), wanted_staging_(random_bytes(staging_bytes)) {
        upload(s_, device_memory_, memory_);
        upload(s_, device_staging_, wanted_staging_);
    }
    ~Moved() {
        OK(cuda.cuMemFree(device_memory_));
        OK(cuda.cuMemFree(device_staging_));
    }
    Moved(const Moved &) = delete;
    Moved &operator=(const Moved &) = delete;

    CUdeviceptr memory() const { return device_memory_; }

    // The rows that move include this one.
    void expect(uint64_t address, uint64_t place, uint64_t bytes) {
        std::memcpy(&wanted_staging_[place], &memory_[address], bytes);
        std::memcpy(&wanted_memory_[address], &memory_[address], bytes);
    }

    // The parameters of the kernels, as in gather.cu, but for the address of staging.
    struct Parameters {
        CUdeviceptr table;
        uint32_t count;
        uint64_t address_distance;
        uint32_t offset_distance;
        uint64_t pitch;
        uint32_t width;
        uint32_t rows_each;
    };
    // Launches both kernels, and compares what they have moved.
    void launch_both(Parameters p, unsigned int blocks) {
        CUmodule module = nullptr;
        OK(cuda.cuModuleLoadDataEx(&module, ptx.c_str(), 0, nullptr, nullptr));
        void *arguments[] = {&device_staging_,   &p.table, &p.count, &p.address_distance,
                             &p.offset_distance, &p.pitch, &p.width, &p.rows_each};
        const auto launch = [&](const char *name) {
            CUfunction function = nullptr;
            OK(cuda.cuModuleGetFunction(&function, module, name));
            OK(cuda.cuLaunchKernel(function, blocks, 1, 1, 512, 1, 1, 0, s_.stream, arguments,
                                   nullptr));
        };
        launch("kvferry_gather");
        CHECK(download(s_, device_staging_, wanted_staging_.size()) == wanted_staging_);
        upload(s_, device_memory_, other_memory_);
        launch("kvferry_scatter");
        CHECK(download(s_, device_memory_, memory_.size()) == wanted_memory_);
        OK(cuda.cuModuleUnload(module));
    }

private:
    const Session &s_;
    const Bytes memory_, other_memory_;
    CUdeviceptr device_memory_, device_staging_;
    Bytes wanted_memory_, wanted_staging_;
};

// Moves rows of these lengths, in random order, with gaps between them in memory and in staging. If
// `aligned`, all begin at multiples of 16 bytes.
void gather_and_scatter(const Session &s, const std::vector<uint32_t> &lengths, unsigned int blocks,
                        bool aligned) {
    std::mt19937_64 engine(lengths.size());
    const uint64_t align = aligned ? 16 : 1;
    std::vector<kvferry_row> rows;
    uint64_t offset = 0, address = 0;
    for (const uint32_t bytes : lengths) {
        offset += engine() % 37;
        address += engine() % 101;
        offset = (offset + align - 1) / align * align;
        address = (address + align - 1) / align * align;
        rows.push_back({address, static_cast<uint32_t>(offset), bytes});
        offset += bytes;
        address += bytes;
    }
    for (size_t i = rows.size(); i > 1; --i) std::swap(rows[i - 1], rows[engine() % i]);
    Moved moved(s, address + 64, offset + 64);
    const uint64_t address_distance = aligned ? 0 : engine();
    const auto offset_distance = static_cast<uint32_t>(aligned ? 0 : engine());
    auto *table =
        reinterpret_cast<kvferry_row *>(allocate_host(rows.size() * sizeof(kvferry_row) + 16));
    for (size_t i = 0; i < rows.size(); ++i) {
        const kvferry_row &row = rows[i];
        moved.expect(row.address, row.offset, row.bytes);
        // The distances are random, so that some sums wrap around.
        table[i] = {row.address + moved.memory() - address_distance, row.offset - offset_distance,
                    row.bytes};
    }
    const uint64_t pitch = engine(); // without meaning where there is a table, as is the width
    moved.launch_both({as_device(table), static_cast<uint32_t>(rows.size()), address_distance,
                       offset_distance, pitch, static_cast<uint32_t>(engine()), 1},
                      blocks);
    OK(cuda.cuMemFreeHost(table));
}

// Moves rows of one width at one pitch, without a table. Staging holds other bytes before `begin`
// and behind the rows.
void gather_and_scatter_regular(const Session &s, uint32_t rows, uint32_t width, uint64_t pitch,
                                uint32_t begin, unsigned int blocks) {
    const uint64_t address = begin % 7;
    Moved moved(s, address + rows * pitch, begin + rows * width + 64);
    for (uint64_t i = 0; i < rows; ++i) {
        moved.expect(address + i * pitch, begin + i * width, width);
    }
    const uint32_t rows_each = 7; // without meaning where there is no table
    moved.launch_both({0, rows, moved.memory() + address, begin, pitch, width, rows_each}, blocks);
}

// Moves regions of one shape, of which a table has the first rows. They lie `gap` bytes apart, in
// memory in the reverse order of that in staging.
void gather_and_scatter_regions(const Session &s, uint32_t regions, uint32_t rows, uint32_t width,
                                uint64_t pitch, uint64_t gap, unsigned int blocks) {
    const uint64_t in_memory = rows * pitch + gap, in_staging = uint64_t{rows} * width + gap;
    Moved moved(s, regions * in_memory, regions * in_staging);
    auto *table = reinterpret_cast<kvferry_row *>(allocate_host(regions * sizeof(kvferry_row)));
    for (uint32_t i = 0; i < regions; ++i) {
        const uint64_t address = (regions - 1 - i) * in_memory, place = i * in_staging;
        table[i] = {moved.memory() + address, static_cast<uint32_t>(place), width};
        for (uint64_t k = 0; k < rows; ++k) {
            moved.expect(address + k * pitch, place + k * width, width);
        }
    }
    moved.launch_both({as_device(table), regions * rows, 0, 0, pitch, width, rows}, blocks);
    OK(cuda.cuMemFreeHost(table));
}

void wrong_modules_are_refused() {
    Session s;
    CUmodule module = nullptr;
    CHECK(cuda.cuModuleLoadData(&module, "not PTX at all") != CUDA_SUCCESS);
    OK(cuda.cuModuleLoadData(&module, ptx.c_str()));
    CUfunction function = nullptr;
    RETURNS(CUDA_ERROR_NOT_FOUND, cuda.cuModuleGetFunction(&function, module, "kvferry_nothing"));
    OK(cuda.cuModuleUnload(module));
}

void kernels_move_regular_rows() {
    Session s;
    for (const unsigned int blocks : {1u, 64u}) {
        gather_and_scatter_regular(s, 1, 1, 1, 0, blocks);
        gather_and_scatter_regular(s, 7, 100, 260, 13, blocks);
        gather_and_scatter_regular(s, 300, 2048, 8192, 268, blocks);
        gather_and_scatter_regular(s, 5000, 2048, 2560, 256, blocks);
        gather_and_scatter_regular(s, 70000, 2, 6, 5, blocks);
        gather_and_scatter_regular(s, 20, 70000, 70001, 4, blocks);
    }
}

void kernels_move_regions_of_one_shape() {
    Session s;
    for (const unsigned int blocks : {1u, 64u}) {
        gather_and_scatter_regions(s, 1, 2, 1, 1, 3, blocks);
        gather_and_scatter_regions(s, 3, 8, 100, 260, 13, blocks);
        gather_and_scatter_regions(s, 28, 1024, 512, 2048, 28, blocks);
        gather_and_scatter_regions(s, 5, 9, 9000, 9001, 12, blocks);
        gather_and_scatter_regions(s, 64, 300, 34, 64, 5, blocks);
    }
}

void kernels_move_rows_of_every_length_and_alignment() {
    Session s;
    std::mt19937_64 engine(1);
    std::vector<uint32_t> small, mixed, skewed(3000, 2);
    for (uint32_t bytes = 0; bytes <= 200; ++bytes) small.push_back(bytes);
    for (int i = 0; i < 3000; ++i)
        mixed.push_back(static_cast<uint32_t>(engine() % (i % 50 == 0 ? 40000 : 600)));
    skewed[1234] = 3u << 20;
    for (const bool aligned : {true, false}) {
        gather_and_scatter(s, {}, 16, aligned);
        gather_and_scatter(s, {0}, 16, aligned);
        gather_and_scatter(s, {1}, 16, aligned);
        gather_and_scatter(s, {(8u << 20) + 5}, 64, aligned);
        gather_and_scatter(s, {1, 70000, 0, 8192, 8193, 33, 32, 31, 16384}, 3, aligned);
        gather_and_scatter(s, small, 16, aligned);
        gather_and_scatter(s, std::vector<uint32_t>(4096, 2048), 64, aligned);
        gather_and_scatter(s, std::vector<uint32_t>(70000, 2), 64, aligned);
        gather_and_scatter(s, mixed, 1, aligned);
        gather_and_scatter(s, mixed, 64, aligned);
        gather_and_scatter(s, skewed, 16, aligned);
    }
}

// ---- What only the simulated driver can show ----------------------------------------------------

void kernels_check_their_bounds() {
    for (const int wrong : {0, 1, 2, 3}) {
        Session s;
        const CUdeviceptr memory = allocate(1000), staging = allocate(1000);
        auto *table = reinterpret_cast<kvferry_row *>(allocate_host(64));
        Bytes pageable(1000);
        table[0] = {memory + 900, 0, 100};
        if (wrong == 0) table[0].bytes = 101;
        if (wrong == 1) table[0].offset = 901;
        if (wrong == 2) table[0].address = as_device(pageable.data());
        CUmodule module = nullptr;
        CUfunction gather = nullptr;
        OK(cuda.cuModuleLoadData(&module, ptx.c_str()));
        OK(cuda.cuModuleGetFunction(&gather, module, "kvferry_gather"));
        CUdeviceptr staging_argument = staging, rows = as_device(table);
        uint32_t count = wrong == 3 ? 5 : 1; // the table has room for four
        uint64_t address_distance = 0;
        uint32_t offset_distance = 0;
        uint64_t pitch = 0;
        uint32_t width = 0, rows_each = 1;
        void *arguments[] = {&staging_argument, &rows,  &count, &address_distance,
                             &offset_distance,  &pitch, &width, &rows_each};
        OK(cuda.cuLaunchKernel(gather, 16, 1, 1, 512, 1, 1, 0, s.stream, arguments, nullptr));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuStreamSynchronize(s.stream));
        cuda.cuModuleUnload(module);
        cuda.cuMemFreeHost(table);
        cuda.cuMemFree(memory);
        cuda.cuMemFree(staging);
    }
}

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(wrong_modules_are_refused),
    TEST(kernels_move_regular_rows),
    TEST(kernels_move_regions_of_one_shape),
    TEST(kernels_move_rows_of_every_length_and_alignment),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(kernels_check_their_bounds),
};
