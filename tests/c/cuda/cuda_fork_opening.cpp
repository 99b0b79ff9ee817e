// A child that is forked while another thread opens the CUDA driver has no CUDA, says so, and does
// not hang.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "cuda.hpp"

int main() {
    setenv("KVFSIM_INIT_MS", "1500", 1);
    if (std::getenv("KVFERRY_TEST_GPU")) SKIP("needs the simulated driver");
    // A program that has not loaded the driver itself: kvferry does.
    std::thread opening([] {
        kvf_engine engine = 0;
        CHECK_OK(kvf_engine_create(nullptr, &engine));
        CHECK_OK(kvf_engine_destroy(engine));
    });
    sleep_ms(500);
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(20); // a child that hangs ends with this
        const kvf_engine engine = make_engine_without_cuda("forked");
        CHECK_OK(kvf_engine_destroy(engine));
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    opening.join();
    return 0;
}
