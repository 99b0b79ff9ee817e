// Transfers of regions that the caller lists.
#pragma once

#include "engine/engine.h"

namespace kvf {

// Submits what kvf_regions_save() or kvf_regions_load() is asked for. `count` is the number of
// regions, `bytes` the size of the buffer. `handle` may be NULL. Throws the errors that kvferry.h
// lists for these functions.
void submit_regions(Engine &engine, Direction direction, const kvf_region *regions, uint64_t count,
                    void *buffer, uint64_t bytes, const kvf_submit_options &options,
                    kvf_job *handle);

} // namespace kvf
