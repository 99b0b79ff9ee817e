// The queues of streams, and the threads that execute them. All functions need the mutex.
#pragma once

#include "state.h"

namespace simulated {

// Makes a stream, and starts its thread.
StreamPtr new_stream(const ContextPtr &context, bool blocking);
// Returns the context's legacy stream, which is made at its first use.
StreamPtr legacy_stream(const ContextPtr &context);
// The stream's thread ends after what is queued.
void close_stream(Stream &stream);

// Queues an operation behind what the stream has, and returns its completion. While a stream is
// being captured, operations are not executed, and count as done.
CompletionPtr submit(const StreamPtr &stream, Operation operation);

// Waits for an operation; NULL: for none.
void wait_for(Lock &lock, const CompletionPtr &completion);
// Waits until all streams of the context are empty.
void wait_for_context(Lock &lock, const Context &context);
// Waits for all operations that may use the range: those that name it, and all kernels, since the
// rows of a kernel's table are not among what it names. Also waits for all operations of `context`,
// as the driver does when device memory is freed; NULL: of none.
void wait_for_uses(Lock &lock, Range range, const Context *context);
// Whether a queued operation names the range. What is queued on a broken context does not count:
// nobody can wait for it.
bool is_used(Range range);

} // namespace simulated
