// Handles are numbers that are never used twice, so that a stale one is an error and not a crash.
#pragma once

#include <cstdint>
#include <memory>

#include "core/status.h"

namespace kvf {

enum class ObjectType : uint64_t { Engine = 1, Queue = 2, Job = 3, Llama = 4 };

// What a handle can name. The library's objects derive from it.
class Object {
public:
    virtual ~Object() = default;
};

// Makes a number of this type that no object has had. Cheap; takes no lock.
uint64_t new_handle(ObjectType type);

void publish(uint64_t handle, std::shared_ptr<Object> object);

// Takes the object out of the table, so that nobody finds it any more. Throws as find() does.
std::shared_ptr<Object> withdraw(uint64_t handle, ObjectType type);

// withdraw() for an object that does not come about. Nothing happens if its handle is not in the
// table: a thread that guessed the number may have released it.
void unpublish(uint64_t handle) noexcept;

// Throws KVF_ERR_INVALID_HANDLE, or KVF_ERR_FORKED for a handle that the parent process made.
std::shared_ptr<Object> find(uint64_t handle, ObjectType type);

template <class T>
std::shared_ptr<T> find(uint64_t handle) {
    return std::static_pointer_cast<T>(find(handle, T::kType));
}

template <class T>
std::shared_ptr<T> withdraw(uint64_t handle) {
    return std::static_pointer_cast<T>(withdraw(handle, T::kType));
}

} // namespace kvf
