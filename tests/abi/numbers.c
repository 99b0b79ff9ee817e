/* Numbers and offsets that programs have compiled in, written down a second time. Once a line has
 * been released, it is never changed while the ABI's number stays; lines are added. */
#include <kvferry.h>

#define IS(name, value) _Static_assert((name) == (value), #name)
#define AT(struct, field, offset) IS(offsetof(struct, field), offset)

IS(KVF_OK, 0);
IS(KVF_ERR_INVALID_ARGUMENT, -1);
IS(KVF_ERR_INVALID_HANDLE, -2);
IS(KVF_ERR_STRUCT_SIZE, -3);
IS(KVF_ERR_OUT_OF_MEMORY, -4);
IS(KVF_ERR_PINNED_LIMIT, -5);
IS(KVF_ERR_BUFFER_TOO_SMALL, -6);
IS(KVF_ERR_BUSY, -7);
IS(KVF_ERR_CLOSED, -8);
IS(KVF_ERR_CANCELLED, -9);
IS(KVF_ERR_TIMEOUT, -10);
IS(KVF_ERR_FORKED, -11);
IS(KVF_ERR_UNSUPPORTED, -12);
IS(KVF_ERR_NO_DEVICE, -13);
IS(KVF_ERR_DEVICE, -14);
IS(KVF_ERR_DEVICE_LOST, -15);
IS(KVF_ERR_UNREACHABLE, -16);
IS(KVF_ERR_SYSTEM, -17);
IS(KVF_ERR_LIBRARY_NOT_FOUND, -18);
IS(KVF_ERR_LIBRARY_AMBIGUOUS, -19);
IS(KVF_ERR_TAP, -20);
IS(KVF_ERR_CONTEXT_FREED, -21);
IS(KVF_ERR_SEQUENCE_RANGE, -22);
IS(KVF_ERR_SEQUENCE_EMPTY, -23);
IS(KVF_ERR_STATE_DAMAGED, -24);
IS(KVF_ERR_STATE_MISMATCH, -25);
IS(KVF_ERR_CACHE_FULL, -26);
IS(KVF_ERR_LLAMA, -27);
IS(KVF_ERR_INTERNAL, -28);

IS(KVF_DEVICES_AUTO, 0);
IS(KVF_DEVICES_HOST, 1);
IS(KVF_DEVICES_CUDA, 2);
IS(KVF_ENGINE_TRACE, 1);
IS(KVF_PRIORITY_BACKGROUND, 0);
IS(KVF_PRIORITY_URGENT, 1);
IS(KVF_SUBMIT_FOLLOW_STREAM, 1);
IS(KVF_SUBMIT_TRUST_STATE, 2);
IS(KVF_SUBMIT_EACH_BLOCK, 4);
IS(KVF_COMPLETION_JOB, 0);
IS(KVF_COMPLETION_BLOCK, 1);
IS(KVF_LLAMA_ALLOW_BLOCKING, 1);
IS(KVF_LLAMA_FORCE_BLOCKING, 2);
IS(KVF_SAVE_AUTO, 0);
IS(KVF_SAVE_IN_PLACE, 1);
IS(KVF_SAVE_SNAPSHOT, 2);
IS(KVF_LOAD_AUTO, 0);
IS(KVF_LOAD_IN_PLACE, 16);
IS(KVF_LOAD_AHEAD, 17);
IS(KVF_BLOCKS_UNSEEN, 0);
IS(KVF_BLOCKS_NONE, 1);
IS(KVF_BLOCKS_CHECKPOINTS_ALONE, 2);
IS(KVF_BLOCKS_WITH_CHECKPOINTS, 3);
IS(KVF_BLOCKS_ALONE, 4);
IS(KVF_DIRECTION_SAVE, 0);
IS(KVF_DIRECTION_LOAD, 1);
IS(KVF_FOREVER, -1);

AT(kvf_engine_options, size, 0);
AT(kvf_engine_options, devices, 4);
AT(kvf_engine_options, flags, 8);
AT(kvf_engine_options, copy_threads, 12);
AT(kvf_engine_options, pinned_limit, 16);
AT(kvf_engine_options, staging_bytes, 24);
AT(kvf_engine_options, error, 32);
AT(kvf_engine_options, error_size, 40);
AT(kvf_engine_options, cuda_devices, 48);

AT(kvf_submit_options, size, 0);
AT(kvf_submit_options, priority, 4);
AT(kvf_submit_options, queue, 8);
AT(kvf_submit_options, callback, 16);
AT(kvf_submit_options, user_data, 24);
AT(kvf_submit_options, mode, 32);
AT(kvf_submit_options, flags, 36);
AT(kvf_submit_options, error, 40);
AT(kvf_submit_options, error_size, 48);
AT(kvf_submit_options, stream, 56);

AT(kvf_llama_options, size, 0);
AT(kvf_llama_options, flags, 4);
AT(kvf_llama_options, library, 8);
AT(kvf_llama_options, error, 16);
AT(kvf_llama_options, error_size, 24);

AT(kvf_completion, job, 0);
AT(kvf_completion, user_data, 8);
AT(kvf_completion, status, 16);
AT(kvf_completion, mode, 20);
AT(kvf_completion, bytes, 24);
AT(kvf_completion, fragments, 32);
AT(kvf_completion, segments, 40);
AT(kvf_completion, submitted_ns, 48);
AT(kvf_completion, started_ns, 56);
AT(kvf_completion, finished_ns, 64);
AT(kvf_completion, detail, 72);
IS(sizeof((kvf_completion *)0)->detail, 128);
AT(kvf_completion, listed_ns, 200);
AT(kvf_completion, recorded_ns, 208);
AT(kvf_completion, kind, 216);
AT(kvf_completion, block, 220);

AT(kvf_trace_event, job, 0);
AT(kvf_trace_event, user_data, 8);
AT(kvf_trace_event, begin_ns, 16);
AT(kvf_trace_event, end_ns, 24);
AT(kvf_trace_event, bytes, 32);
AT(kvf_trace_event, device, 40);
AT(kvf_trace_event, direction, 44);

/* Arrays of it are passed without a stride: it cannot grow. */
IS(sizeof(kvf_region), 48);
AT(kvf_block, buffer, 0);
AT(kvf_block, bytes, 8);
AT(kvf_block, begin, 16);
AT(kvf_block, end, 20);
AT(kvf_state_options, size, 0);
AT(kvf_state_options, parts_in_blocks, 4);
AT(kvf_state_options, error, 8);
AT(kvf_state_options, error_size, 16);
AT(kvf_region, address, 0);
AT(kvf_region, width, 8);
AT(kvf_region, rows, 16);
AT(kvf_region, pitch, 24);
AT(kvf_region, offset, 32);
AT(kvf_region, buffer_pitch, 40);
