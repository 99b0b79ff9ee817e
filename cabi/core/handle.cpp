#include "core/handle.h"

#include <array>
#include <atomic>
#include <mutex>
#include <new>
#include <unordered_map>

#include "core/fork.h"

namespace kvf {
namespace {

constexpr uint64_t kTypeBits = 3;
constexpr uint64_t kShards = 16;

// Several shards, so that jobs submitted on one thread and polled on another do not meet at one
// lock.
struct alignas(64) Shard {
    std::mutex mutex;
    std::unordered_map<uint64_t, std::shared_ptr<Object>> objects;
};

struct Table {
    std::array<Shard, kShards> shards;
    std::atomic<uint64_t> next{1};
    std::atomic<uint64_t> forked_below{0}; // numbers below this one were given out by the parent

    Table() {
        // In a forked child the parent's objects are unusable (their threads do not exist) and must
        // not be destroyed either. They are forgotten: their memory leaks, once, in the child.
        on_fork(
            [this] {
                for (auto &shard : shards) shard.mutex.lock();
            },
            [this] {
                for (auto &shard : shards) shard.mutex.unlock();
            },
            [this] {
                for (auto &shard : shards) new (&shard) Shard;
                forked_below = next.load();
            });
    }
};

Table &table() {
    static Table *table = new Table; // never destroyed: threads may outlive static destructors
    return *table;
}

Shard &shard_of(uint64_t handle) { return table().shards[(handle >> kTypeBits) % kShards]; }

[[noreturn]] void throw_unknown(uint64_t handle) {
    if (handle && (handle >> kTypeBits) < table().forked_below) throw Error(KVF_ERR_FORKED);
    throw Error(KVF_ERR_INVALID_HANDLE, handle ? "" : "handle is 0");
}

bool has_type(uint64_t handle, ObjectType type) {
    return (handle & ((1u << kTypeBits) - 1)) == static_cast<uint64_t>(type);
}

} // namespace

uint64_t new_handle(ObjectType type) {
    return table().next.fetch_add(1, std::memory_order_relaxed) << kTypeBits |
           static_cast<uint64_t>(type);
}

void publish(uint64_t handle, std::shared_ptr<Object> object) {
    Shard &shard = shard_of(handle);
    std::lock_guard lock(shard.mutex);
    shard.objects.emplace(handle, std::move(object));
}

std::shared_ptr<Object> withdraw(uint64_t handle, ObjectType type) {
    Shard &shard = shard_of(handle);
    std::lock_guard lock(shard.mutex);
    auto it = shard.objects.find(handle);
    if (it == shard.objects.end() || !has_type(handle, type)) throw_unknown(handle);
    auto object = std::move(it->second);
    shard.objects.erase(it);
    return object;
}

void unpublish(uint64_t handle) noexcept {
    std::shared_ptr<Object> object; // destroyed without the lock
    Shard &shard = shard_of(handle);
    std::lock_guard lock(shard.mutex);
    const auto it = shard.objects.find(handle);
    if (it == shard.objects.end()) return;
    object = std::move(it->second);
    shard.objects.erase(it);
}

std::shared_ptr<Object> find(uint64_t handle, ObjectType type) {
    Shard &shard = shard_of(handle);
    std::lock_guard lock(shard.mutex);
    auto it = shard.objects.find(handle);
    if (it == shard.objects.end() || !has_type(handle, type)) throw_unknown(handle);
    return it->second;
}

} // namespace kvf
