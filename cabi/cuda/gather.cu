// SPDX-License-Identifier: MIT
//
// The irregular rest of a layout: rows of any length at any address, gathered into device staging
// (or scattered from it), so that the copy engine then moves staging as one piece.
//
// Compiled to gather.ptx by tools/compile_kernels.py; commit both. No header is included, so that
// the result depends on this file and on the compiler's version alone.
//
//   grid    16 to 64 blocks for a slot of 16 MiB; any number is right
//   block   512 threads
//   shared  none to ask for
//
// The table is read once, from device memory, each block its part of it. It must be 16-byte
// aligned. Rows of one scatter must not overlap. One table serves all tensors that are fragmented
// alike: `address_distance` is added to each row's address, and `offset_distance` to its place in
// staging, modulo 2^64 and 2^32.
//
// If `rows_each` is above 1, each entry of the table stands for a whole region: it is the first of
// `rows_each` rows of one width, which lie `pitch` apart in memory and without gaps in staging.
// `row_count` counts the rows of all regions. Without a table (NULL) there is one region: its rows
// of `width` bytes begin at `address_distance`.

struct Row {
    unsigned long long address; // in device memory, or mapped pinned memory; any alignment
    unsigned int offset;        // of the row in staging, in bytes; any alignment
    unsigned int bytes;         // may be 0
};

struct alignas(16) Vector16 {
    unsigned int words[4];
};

// An enumeration, because constants would become variables of the module.
enum : unsigned int {
    THREADS = 512,
    WARP = 32,
    WARPS = THREADS / WARP,
    CHUNK = THREADS, // rows of the table held in shared memory at once: 8 KiB

    // A row of up to TINY bytes is copied by one thread; all others by warps, TILE bytes at a time.
    TINY = 128,
    TILE = 8192,

    // Up to here, every block reads the whole table, and tiles are dealt to the warps of the whole
    // grid: a few long rows would leave most blocks idle otherwise. Beyond, each block has rows of
    // its own.
    FEW = 256,
};

// Staging and cache are used once: don't displace the model's own lines in L2. Written as assembly
// because NVRTC 11.7 has these instructions only as functions of headers.
static __device__ __forceinline__ Vector16 load(const Vector16 *from) {
    Vector16 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(from)
                 : "memory");
    return v;
}
static __device__ __forceinline__ void store(Vector16 *to, Vector16 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
}
template <typename Unit>
static __device__ __forceinline__ Unit load(const Unit *from) {
    return *from;
}
template <typename Unit>
static __device__ __forceinline__ void store(Unit *to, Unit value) {
    *to = value;
}

// What a single thread does, where addresses and length are multiples of sizeof(Unit).
template <typename Unit>
static __device__ __forceinline__ void copy_tiny_units(unsigned char *to, const unsigned char *from,
                                                       unsigned int bytes) {
    constexpr unsigned int SIZE = sizeof(Unit);
    constexpr unsigned int UNROLL = SIZE == 16 ? 4 : 8;
    Unit *target = reinterpret_cast<Unit *>(to);
    const Unit *source = reinterpret_cast<const Unit *>(from);
#pragma unroll 1
    for (unsigned int i = 0; i * SIZE < bytes; i += UNROLL) {
        Unit values[UNROLL];
#pragma unroll
        for (unsigned int k = 0; k < UNROLL; ++k)
            if ((i + k) * SIZE < bytes) values[k] = load(source + i + k);
#pragma unroll
        for (unsigned int k = 0; k < UNROLL; ++k)
            if ((i + k) * SIZE < bytes) store(target + i + k, values[k]);
    }
}

static __device__ __forceinline__ void copy_tiny(unsigned char *to, const unsigned char *from,
                                                 unsigned int bytes) {
    const unsigned int mix = static_cast<unsigned int>(reinterpret_cast<unsigned long long>(to) |
                                                       reinterpret_cast<unsigned long long>(from)) |
                             bytes;
    if (mix % 16 == 0)
        copy_tiny_units<Vector16>(to, from, bytes);
    else if (mix % 4 == 0)
        copy_tiny_units<unsigned int>(to, from, bytes);
    else if (mix % 2 == 0)
        copy_tiny_units<unsigned short>(to, from, bytes);
    else
        copy_tiny_units<unsigned char>(to, from, bytes);
}

// What a warp does, where both addresses have the same remainder modulo sizeof(Unit): bytes up to
// the first whole unit, units, the bytes that are left.
template <typename Unit>
static __device__ __forceinline__ void copy_units(unsigned char *to, const unsigned char *from,
                                                  unsigned int bytes, unsigned int lane) {
    constexpr unsigned int SIZE = sizeof(Unit);
    unsigned int head = static_cast<unsigned int>(-reinterpret_cast<unsigned long long>(to)) % SIZE;
    head = head < bytes ? head : bytes;
    const unsigned int units = (bytes - head) / SIZE;
    const unsigned int done = head + units * SIZE;
    const unsigned int tail = bytes - done;

    // Loads go ahead of stores: what hides the latency of the memory is how much is under way, up
    // to 2 KiB a warp here. There is a lane for each byte of head and tail.
    unsigned char head_byte = 0, tail_byte = 0;
    if (lane < head) head_byte = from[lane];
    if (lane < tail) tail_byte = from[done + lane];

    constexpr unsigned int UNROLL = SIZE == 8 || SIZE == 4 ? 8 : 4;
    Unit *target = reinterpret_cast<Unit *>(to + head) + lane;
    const Unit *source = reinterpret_cast<const Unit *>(from + head) + lane;
#pragma unroll 1
    for (int left = static_cast<int>(units - lane); left > 0; left -= UNROLL * WARP) {
        Unit values[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k)
            if (k * static_cast<int>(WARP) < left) values[k] = load(source + k * WARP);
#pragma unroll
        for (int k = 0; k < UNROLL; ++k)
            if (k * static_cast<int>(WARP) < left) store(target + k * WARP, values[k]);
        source += UNROLL * WARP;
        target += UNROLL * WARP;
    }

    if (lane < head) to[lane] = head_byte;
    if (lane < tail) to[done + lane] = tail_byte;
}

// With the widest unit that both addresses can share.
static __device__ __forceinline__ void copy(unsigned char *to, const unsigned char *from,
                                            unsigned int bytes, unsigned int lane) {
    const unsigned int shift = static_cast<unsigned int>(
        reinterpret_cast<unsigned long long>(to) ^ reinterpret_cast<unsigned long long>(from));
    if (shift % 16 == 0)
        copy_units<Vector16>(to, from, bytes, lane);
    else if (shift % 8 == 0)
        copy_units<unsigned long long>(to, from, bytes, lane);
    else if (shift % 4 == 0)
        copy_units<unsigned int>(to, from, bytes, lane);
    else if (shift % 2 == 0)
        copy_units<unsigned short>(to, from, bytes, lane);
    else
        copy_units<unsigned char>(to, from, bytes, lane);
}

template <bool GATHER>
static __device__ __forceinline__ void
move(unsigned long long staging, const Row *table, unsigned int row_count,
     unsigned long long address_distance, unsigned int offset_distance, unsigned long long pitch,
     unsigned int width, unsigned int rows_each) {
    __shared__ Row rows[CHUNK];
    const unsigned int thread = threadIdx.x;
    const unsigned int warp = thread / WARP;
    const unsigned int lane = thread % WARP;

    // The rows of this block, and the warps that share them.
    const bool together = row_count <= FEW;
    const unsigned int share = together ? row_count : (row_count - 1) / gridDim.x + 1;
    const unsigned long long first =
        together ? 0 : static_cast<unsigned long long>(blockIdx.x) * share;
    const unsigned long long last = first + share < row_count ? first + share : row_count;
    const unsigned int team = together ? WARPS * gridDim.x : WARPS;
    const unsigned int member = together ? warp * gridDim.x + blockIdx.x : warp;

    for (unsigned long long base = first; base < last; base += CHUNK) {
        const unsigned int count =
            last - base < CHUNK ? static_cast<unsigned int>(last - base) : CHUNK;
        __syncthreads(); // the chunk before has been used
        Row own = {0, 0, 0};
        if (thread < count) {
            const unsigned long long row = base + thread;
            if (!table) {
                own = {row * pitch, static_cast<unsigned int>(row) * width, width};
            } else if (rows_each <= 1) {
                own = table[row];
            } else {
                const unsigned int nth = static_cast<unsigned int>(row);
                own = table[nth / rows_each];
                own.address += nth % rows_each * pitch;
                own.offset += nth % rows_each * own.bytes;
            }
            own.address += address_distance;
            own.offset += offset_distance;
            rows[thread] = own;
        }
        const bool tiled = __syncthreads_or(own.bytes > TILE);

        if (own.bytes <= TINY && (!together || blockIdx.x == 0)) {
            unsigned char *place = reinterpret_cast<unsigned char *>(staging + own.offset);
            unsigned char *memory = reinterpret_cast<unsigned char *>(own.address);
            copy_tiny(GATHER ? place : memory, GATHER ? memory : place, own.bytes);
        }

        // Tiles are counted through the chunk, and tile number n is of team member n % team. Where
        // no row has more than one, row and tile are the same; else the rows are walked. `tile`
        // counts from the start of row i.
        unsigned int i = tiled ? 0 : member;
        unsigned int tile = tiled ? member : 0;
        for (;;) {
            if (tiled)
                while (i < count) {
                    const unsigned int bytes = rows[i].bytes;
                    const unsigned int tiles = bytes > TINY ? (bytes - 1) / TILE + 1 : 0;
                    if (tile < tiles) break;
                    tile -= tiles;
                    ++i;
                }
            if (i >= count) break;
            const Row row = rows[i];
            if (row.bytes > TINY) {
                const unsigned int begin = tile * TILE;
                const unsigned int left = row.bytes - begin;
                unsigned char *place =
                    reinterpret_cast<unsigned char *>(staging + row.offset + begin);
                unsigned char *memory = reinterpret_cast<unsigned char *>(row.address + begin);
                copy(GATHER ? place : memory, GATHER ? memory : place, left < TILE ? left : TILE,
                     lane);
            }
            if (tiled)
                tile += team;
            else
                i += team;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kvferry_gather(unsigned long long staging, const Row *table, unsigned int row_count,
                   unsigned long long address_distance, unsigned int offset_distance,
                   unsigned long long pitch, unsigned int width, unsigned int rows_each) {
    move<true>(staging, table, row_count, address_distance, offset_distance, pitch, width,
               rows_each);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kvferry_scatter(unsigned long long staging, const Row *table, unsigned int row_count,
                    unsigned long long address_distance, unsigned int offset_distance,
                    unsigned long long pitch, unsigned int width, unsigned int rows_each) {
    move<false>(staging, table, row_count, address_distance, offset_distance, pitch, width,
                rows_each);
}
