#include "llama/waiting.h"

#include <cstring>
#include <optional>

namespace kvf {
namespace {

MemoryRange range_of(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                     const GgmlApi &ggml) {
    const uint64_t begin = reinterpret_cast<uint64_t>(ggml.get_data(tensor)) + offset;
    return {begin, begin + bytes};
}

MemoryRange range_of(const ggml_tensor *tensor, const GgmlApi &ggml) {
    return range_of(tensor, 0, ggml.nbytes(tensor), ggml);
}

// What a node of a graph does to memory that it does not own; nothing for views, which leave it as
// it is.
std::optional<Access> access_of(const ggml_tensor *node, const GgmlApi &ggml) {
    const char *const operation = ggml.op_desc(node);
    for (const char *view : {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"}) {
        if (std::strcmp(operation, view) == 0) return std::nullopt;
    }
    // What decoding does: the rows belong to the cells of its tokens, and so to no other
    // sequence's.
    if (std::strcmp(operation, "SET_ROWS") == 0) return Access::WriteRows;
    return Access::Write; // shifts, moves of recurrent cells
}

// The rows of keys that decoding is about to write, in a cache of one kind of attention. Releases
// before v0.5.0 do not name this input of the graph. libllama itself writes it before it computes,
// so it lies in host memory.
RowNumbers rows_to_be_written(const ggml_cgraph *graph, const GgmlApi &ggml) {
    const ggml_tensor *const input = ggml.graph_get_tensor(graph, "attn_inp_k_idxs");
    if (!input) return {};
    return {static_cast<const int64_t *>(ggml.get_data(input)),
            ggml.nbytes(input) / sizeof(int64_t)};
}

} // namespace

void wait_for_transfers(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes, Access access,
                        const GgmlApi &ggml) {
    if (Fence::any()) Fence::wait(range_of(tensor, offset, bytes, ggml), access);
}

void wait_for_transfers(const ggml_tensor *tensor, Access access, const GgmlApi &ggml) {
    if (Fence::any()) Fence::wait(range_of(tensor, ggml), access);
}

void wait_for_transfers(ggml_backend_buffer *buffer, const GgmlApi &ggml) {
    if (!Fence::any()) return;
    const auto begin = reinterpret_cast<uint64_t>(ggml.buffer_get_base(buffer));
    Fence::wait({begin, begin + ggml.buffer_get_size(buffer)}, Access::Write);
}

void wait_for_transfers(ggml_cgraph *graph, const GgmlApi &ggml) {
    if (!Fence::any()) return;
    const MemoryRange extent = Fence::extent();
    const int count = ggml.graph_n_nodes(graph);
    const RowNumbers rows = rows_to_be_written(graph, ggml);
    for (int i = 0; i < count; ++i) {
        const ggml_tensor *const node = ggml.graph_node(graph, i);
        if (reinterpret_cast<uint64_t>(ggml.get_data(node)) >= extent.end) continue;
        const MemoryRange range = range_of(node, ggml);
        if (range.end <= extent.begin) continue;
        if (const auto access = access_of(node, ggml)) Fence::wait(range, *access, rows);
    }
}

} // namespace kvf
