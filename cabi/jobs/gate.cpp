#include "jobs/gate.h"

#include <thread>

namespace kvf {

bool Gate::is_open() {
    if (!was_open() && is_done()) open_.store(true, std::memory_order_release);
    return was_open();
}

void Gate::wait() {
    while (!is_open()) std::this_thread::sleep_for(kPoll);
}

} // namespace kvf
