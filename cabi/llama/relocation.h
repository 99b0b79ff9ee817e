// The relocation slots of a loaded library: the words through which it calls functions of other
// libraries.
//
// The loader fills them in. What is written into a slot is called instead, from then on and by this
// library alone.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvf {

// A function whose calls are to be replaced.
struct Replacement {
    const char *name;
    void *ours;
    bool required; // the library must call it
    void *bound;   // the function itself, as the loader binds it
    // What our function calls: the function itself, or what somebody else has put before it. Set by
    // find().
    void *previous;
    bool found = false;
};

// The slots of one library in which our functions are. Not locked.
class RelocationSlots {
public:
    bool empty() const { return slots_.empty(); }

    // Finds the slots of the library that is loaded at `base`, and writes nothing. Throws
    // KVF_ERR_TAP where a required function has no slot. `path` is for that text.
    void find(uint64_t base, const std::string &path, std::span<Replacement> replacements);
    // Puts our functions into the slots, except slots that somebody else has overwritten; also into
    // those that the loader has bound since. Throws KVF_ERR_TAP.
    void write();
    // Restores what was there before. Does nothing where somebody else has put a function there
    // after us: they call ours, which stay.
    void restore() noexcept;

private:
    struct Slot {
        void **place;
        void *previous;
        void *bound; // calls are bound lazily, so the loader may put it there after us
        void *ours;
        int protection; // of its page, once the loader is done with it

        void *content() const { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
        bool is_ours() const { return content() == ours; }
        // As if we had never been there: nobody calls ours. (Whoever else put something there after
        // us calls us.)
        bool is_without_ours() const { return content() == previous || content() == bound; }
        void write(void *value) const;
    };
    struct ObjectTables;

    static std::vector<Slot> find_all(const ObjectTables &tables,
                                      std::span<Replacement> replacements);

    std::vector<Slot> slots_;
};

} // namespace kvf
