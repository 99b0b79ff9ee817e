// fork(): every lock that is global to the process is held over it, so that the child finds its
// data whole, and what only lives in the parent is forgotten in the child.
#pragma once

#include <functional>

namespace kvf {

// Registers handlers for pthread_atfork(): `before` and `parent` lock and unlock; `child` runs in
// the child instead of `parent`. Never unregistered: for objects that live as long as the process.
void on_fork(std::function<void()> before, std::function<void()> parent,
             std::function<void()> child);

} // namespace kvf
