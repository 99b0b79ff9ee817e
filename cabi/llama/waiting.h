// What calls of libllama wait for before they touch memory of tensors: the transfers in flight that
// they would disturb (jobs/fences.h).
#pragma once

#include "jobs/fences.h"
#include "llama/api.h"

namespace kvf {

// Before bytes of a tensor are read or written.
void wait_for_transfers(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes, Access access,
                        const GgmlApi &ggml);
// Before all bytes of a tensor are.
void wait_for_transfers(const ggml_tensor *tensor, Access access, const GgmlApi &ggml);
// Before a buffer of tensors is overwritten.
void wait_for_transfers(ggml_backend_buffer *buffer, const GgmlApi &ggml);
// Before a graph is computed.
void wait_for_transfers(ggml_cgraph *graph, const GgmlApi &ggml);

} // namespace kvf
