// A device is given up because a copy does not end: other devices and the host go on. What the
// driver still has registered stays mapped, is not given to anybody else, and is not taken for
// pinned when its owner unmaps it.
#include "cuda.hpp"

namespace {

constexpr uint64_t kBytes = 4 * MiB;

void move(kvf_engine engine, const DeviceMemory &device, const Buffer &buffer, Random &random) {
    const Regions regions = {{device.address(), kBytes, 1, 0, 0, 0}};
    const Bytes content = random_bytes(random, kBytes);
    device.write(content);
    succeed(start(engine, Way::Save, regions, buffer));
    CHECK(buffer.holds(content));
    const Bytes other = random_bytes(random, kBytes);
    buffer.fill(other);
    succeed(start(engine, Way::Load, regions, buffer));
    CHECK(device.read() == other);
}

// With every kind of buffer.
void others_go_on(kvf_engine engine, const DeviceMemory &other, Random &random) {
    for (const Kind kind : {Kind::Pool, Kind::Foreign, Kind::Pageable}) {
        const Buffer buffer(engine, kind, kBytes);
        move(engine, other, buffer, random);
        Bytes host = random_bytes(random, kBytes);
        succeed(start(engine, Way::Save, {plain_region(host.data(), kBytes, 0)}, buffer));
        CHECK(buffer.holds(host));
    }
}

// The buffer that the copy names goes to nobody; the one beside it does until it should be
// unmapped.
void buffers_stay_mapped(const Engine &engine, void *stuck, void *idle) {
    CHECK_OK(kvf_buffer_free(stuck));
    void *again = nullptr;
    CHECK_OK(kvf_buffer_alloc(engine, kBytes, &again));
    CHECK(again != stuck);
    CHECK_OK(kvf_buffer_free(again));
    CHECK_OK(kvf_buffer_free(idle));
    const uint64_t registered = driver().count("live_registrations");
    CHECK_OK(kvf_buffer_trim(engine));
    CHECK(driver().count("live_registrations") == registered && !engine.describes("\"lost\": 0,"));
    static_cast<char *>(idle)[0] = static_cast<char *>(stuck)[0] = 1; // still mapped
}

// The owner of memory is told, and may unmap it: the driver's registration of the place means
// nothing then.
void owner_may_unmap(kvf_engine engine, void *own, const DeviceMemory &other) {
    CHECK_STATUS(KVF_ERR_DEVICE_LOST, kvf_buffer_unregister(engine, own));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, own, kBytes));
    CHECK(mmap(own, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
               0) == own);
    Engine next;
    for (const kvf_engine one : {engine, kvf_engine{next}}) {
        CHECK_OK(kvf_buffer_trim(one));
        const kvf_region whole = {other.address(), kBytes, 1, 0, 0, 0};
        const uint64_t pinned = driver().count("pinned_bytes");
        kvf_job job = 0;
        CHECK_OK(kvf_regions_save(one, &whole, 1, own, kBytes, nullptr, &job));
        succeed(job);
        CHECK(memcmp(own, other.read().data(), kBytes) == 0);
        CHECK(driver().count("pinned_bytes") > pinned); // it went through a bounce buffer
    }
}

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation(2);
    Random random(26);
    const Context second(1);
    const DeviceMemory other(kBytes);
    const Context first(0);
    const DeviceMemory device(kBytes);
    Engine engine;

    void *stuck = nullptr, *idle = nullptr;
    CHECK_OK(kvf_buffer_alloc(engine, kBytes, &stuck));
    CHECK_OK(kvf_buffer_alloc(engine, kBytes, &idle));
    void *own = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(own != MAP_FAILED);
    CHECK_OK(kvf_buffer_register(engine, own, kBytes));

    driver().hold("copy", 1, 0);
    const kvf_region region = {device.address(), kBytes, 1, 0, 0, 0};
    kvf_job job = 0;
    CHECK_OK(kvf_regions_save(engine, &region, 1, stuck, kBytes, nullptr, &job));
    CHECK(finish(job).status == KVF_ERR_DEVICE_LOST);
    CHECK(engine.describes("\"broken\": true") && engine.describes("\"lost\": 0,"));

    second.adopt();
    others_go_on(engine, other, random);
    // The one that was given up says so.
    CHECK_OK(kvf_regions_save(engine, &region, 1, idle, kBytes, nullptr, &job));
    CHECK(finish(job).status == KVF_ERR_DEVICE_LOST);

    buffers_stay_mapped(engine, stuck, idle);
    owner_may_unmap(engine, own, other);

    const int64_t begin = clock_ns();
    engine.destroy();
    CHECK(clock_ns() - begin < 5 * SECONDS);
    exit(0); // to free the memory that this test has would wait for the copy
}
