// Pages of the process's memory, and probes: whether memory may be read or written, without
// touching it.
#pragma once

#include <cstdint>
#include <map>

namespace kvf {

uint64_t page_size();
inline uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Whether memory may be written: probes the pages that a range begins and ends in, and remembers
// the last ones.
class WritableCheck {
public:
    bool operator()(uint64_t address, uint64_t bytes);

private:
    bool is_writable(uint64_t address);
    uint64_t last_begin_ = 0, last_end_ = 0; // pages that may be written
};

// Whether memory may be read: probes single pages at first, and reads the list of all mappings when
// there are many questions.
class MappedCheck {
public:
    // False where the page that [address, address + bytes) begins or ends in is not mapped, or
    // without access.
    bool operator()(uint64_t address, uint64_t bytes);

private:
    bool is_accessible(uint64_t page);
    void read_mappings();
    bool is_in_mappings(uint64_t page);

    uint64_t known_begin_ = 0, known_end_ = 0; // that may be read: where the last answer came from
    uint64_t questions_ = 0;
    std::map<uint64_t, uint64_t> mappings_; // begin, end
};

} // namespace kvf
