"""Measures many jobs at once: cancels, submissions beside jobs that follow streams, order.

    make bench-scheduling                              this tree
    make bench-scheduling ARGS="--before 79c2e9e"      that revision beside it, on the same machine

No GPU is needed: streams are those of the simulated driver, or of the one that KVFERRY_CUDA_DRIVER
names. Each library is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = ROOT / "build/native/tests/simulated_cuda/libcuda_simulated.so"

CANCELS = 20_000
FOLLOWING = 5_000
EQUAL = 2_000

DRIVER = """
int cuInit(unsigned int);
int cuDevicePrimaryCtxRetain(void **, int);
int cuCtxSetCurrent(void *);
int cuStreamCreateWithPriority(void **, unsigned int, int);
int cuMemAlloc_v2(uint64_t *, size_t);
int cuMemHostAlloc(void **, size_t, unsigned int);
int cuMemHostGetDevicePointer_v2(uint64_t *, void *, unsigned int);
int cuStreamWaitValue32_v2(void *, uint64_t, uint32_t, unsigned int);
"""
PORTABLE_AND_MAPPED, NON_BLOCKING, WAIT_EQUAL = 3, 1, 1
FOREVER = -1  # KVF_FOREVER: cffi reads no macros


class Library:
    """A libkvferry, and jobs that it moves."""

    def __init__(self, path: Path, header: Path) -> None:
        sys.path.insert(0, str(ROOT / "pyshim"))
        from build_native import declarations

        self.ffi = cffi.FFI()
        text = declarations(header, "cc")
        self.ffi.cdef("".join(line for line in text.splitlines(True) if "..." not in line))
        self.lib = self.ffi.dlopen(str(path))

    def check(self, status: int) -> None:
        if status < 0:
            raise RuntimeError(self.ffi.string(self.lib.kvf_strerror(status)).decode())

    def engine(self, devices: int) -> int:
        options = self.ffi.new("kvf_engine_options *")
        options.size = self.ffi.sizeof("kvf_engine_options")
        options.devices = devices
        engine = self.ffi.new("kvf_engine *")
        self.check(self.lib.kvf_engine_create(options, engine))
        return int(engine[0])

    def queue(self) -> int:
        queue = self.ffi.new("kvf_queue *")
        self.check(self.lib.kvf_queue_create(queue))
        return int(queue[0])

    def submitter(
        self, engine: int, address: int, nbytes: int, buffer: Any, rows: int = 1, **given: int
    ) -> Callable[[], int]:
        """What saves `nbytes` there, `rows` times over, and returns the job."""
        regions = self.ffi.new("kvf_region[]", rows)
        for region in regions:
            region.address, region.width, region.rows = address, nbytes, 1
        options = self.ffi.new("kvf_submit_options *")
        options.size = self.ffi.sizeof("kvf_submit_options")
        for name, value in given.items():
            setattr(options, name, value)
        job = self.ffi.new("kvf_job *")
        save = self.lib.kvf_regions_save

        def submit() -> int:
            self.check(save(engine, regions, rows, buffer, nbytes, options, job))
            return int(job[0])

        return submit

    def cancel(self, job: int) -> None:
        self.check(self.lib.kvf_job_cancel(job))

    def wait(self, job: int) -> None:
        self.check(self.lib.kvf_job_wait(job, FOREVER, self.ffi.NULL, 0))

    def memory(self, nbytes: int) -> tuple[Any, int]:
        memory = self.ffi.new("unsigned char[]", nbytes)
        return memory, int(self.ffi.cast("uintptr_t", memory))


def figures(name: str, times: list[float]) -> dict[str, float]:
    """Of calls that took so many milliseconds. The longest tells most of the machine's load."""
    return {
        f"{name} | ms, median": statistics.median(times),
        f"{name} | ms, 99 of 100 are shorter": statistics.quantiles(times, n=100)[-1],
        f"{name} | ms, the longest": max(times),
    }


def hold_background(library: Library, engine: int) -> Callable[[], None]:
    """Keeps background jobs of the host waiting until the result is called."""
    nbytes = 4 << 20
    memory, address = library.memory(nbytes)
    buffer, _ = library.memory(nbytes)
    urgent = library.lib.KVF_PRIORITY_URGENT
    held = [memory, buffer]  # while the job moves
    job = library.submitter(engine, address, nbytes, buffer, 100_000, priority=urgent)()

    def release() -> None:
        library.cancel(job)
        library.wait(job)
        held.clear()

    return release


def cancels(library: Library) -> dict[str, float]:
    """Jobs that wait are cancelled one by one."""
    engine = library.engine(library.lib.KVF_DEVICES_HOST)
    release = hold_background(library, engine)
    _memory, address = library.memory(32 << 10)
    buffer, _ = library.memory(32 << 10)
    submit = library.submitter(engine, address, 32 << 10, buffer)
    jobs = [submit() for _ in range(CANCELS)]
    times = []
    for job in jobs:
        begin = time.perf_counter()
        library.cancel(job)
        times.append((time.perf_counter() - begin) * 1e3)
    for job in jobs:
        library.wait(job)
    release()
    library.check(library.lib.kvf_engine_destroy(engine))
    return figures(f"{CANCELS:,} single cancels", times) | {
        f"{CANCELS:,} single cancels | s, all": sum(times) / 1e3
    }


class HeldStream:
    """A stream of the CUDA driver that is at work until `release`, and some device memory."""

    def __init__(self) -> None:
        ffi = cffi.FFI()
        ffi.cdef(DRIVER)
        cuda = ffi.dlopen(os.environ["KVFERRY_CUDA_DRIVER"])

        def done(result: int) -> None:
            if result:
                raise RuntimeError(f"CUDA error {result}")

        context, stream, word = (ffi.new("void **") for _ in range(3))
        device_word, memory = (ffi.new("uint64_t *") for _ in range(2))
        done(cuda.cuInit(0))
        done(cuda.cuDevicePrimaryCtxRetain(context, 0))
        done(cuda.cuCtxSetCurrent(context[0]))
        done(cuda.cuStreamCreateWithPriority(stream, NON_BLOCKING, 0))
        done(cuda.cuMemAlloc_v2(memory, 4096))
        done(cuda.cuMemHostAlloc(word, 4, PORTABLE_AND_MAPPED))
        done(cuda.cuMemHostGetDevicePointer_v2(device_word, word[0], 0))
        self._driver = cuda  # cffi unloads the library with this object
        self._word = ffi.cast("uint32_t *", word[0])
        self._word[0] = 0
        done(cuda.cuStreamWaitValue32_v2(stream[0], device_word[0], 1, WAIT_EQUAL))
        self.handle = int(ffi.cast("uintptr_t", stream[0]))
        self.memory: int = memory[0]
        """The address of 4096 bytes on the device."""

    def release(self) -> None:
        self._word[0] = 1


def submissions(library: Library) -> dict[str, float]:
    """Jobs are submitted beside others that follow a stream, which is at work all the time."""
    ffi, lib = library.ffi, library.lib
    stream = HeldStream()
    engine = library.engine(lib.KVF_DEVICES_CUDA)
    buffer = ffi.new("void **")
    library.check(lib.kvf_buffer_alloc(engine, 4096, buffer))
    follow = library.submitter(
        engine,
        stream.memory,
        4096,
        buffer[0],
        flags=lib.KVF_SUBMIT_FOLLOW_STREAM,
        stream=stream.handle,
    )
    jobs = [follow() for _ in range(FOLLOWING)]
    submit = library.submitter(engine, stream.memory, 4096, buffer[0])
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        jobs.append(submit())
        times.append((time.perf_counter() - begin) * 1e3)
        time.sleep(0.002)
    stream.release()
    for job in jobs:
        library.wait(job)
    library.check(lib.kvf_buffer_free(buffer[0]))
    library.check(lib.kvf_engine_destroy(engine))
    return figures(f"submissions beside {FOLLOWING:,} jobs that follow a stream", times)


def order(library: Library) -> dict[str, float]:
    """Equal jobs of several pieces: how many have begun as half have given their buffers back."""
    lib = library.lib
    engine, queue = library.engine(lib.KVF_DEVICES_HOST), library.queue()
    release = hold_background(library, engine)
    nbytes = 3 << 19
    _memory, address = library.memory(nbytes)
    buffer, _ = library.memory(nbytes)
    submit = library.submitter(engine, address, nbytes, buffer, queue=queue)
    for _ in range(EQUAL):
        submit()
    release()
    done = library.ffi.new("kvf_completion *")
    size = library.ffi.sizeof("kvf_completion")
    started, finished = [], []
    for _ in range(EQUAL):
        library.check(lib.kvf_queue_take(queue, done, size, 1, FOREVER))
        started.append(done.started_ns)
        finished.append(done.finished_ns)
    library.check(lib.kvf_engine_destroy(engine))
    library.check(lib.kvf_queue_destroy(queue))
    half = sorted(finished)[EQUAL // 2 - 1]
    held = sum(begin < half for begin in started) - EQUAL // 2
    return {f"as half of {EQUAL:,} equal jobs have ended | others begun": held}


def measure(library: Library) -> dict[str, float]:
    return cancels(library) | submissions(library) | order(library)


def in_child(library: Path, header: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--library", str(library), "--header", str(header)]
    environment = {"KVFERRY_CUDA_DRIVER": str(SIMULATED)} | os.environ
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return dict(json.loads(done.stdout))


def build(revision: str) -> tuple[Path, Path]:
    """The library of a revision, and its header."""
    named = subprocess.run(
        ["git", "rev-parse", "--short", f"{revision}^{{commit}}"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()
    tree = ROOT / "build" / "bench" / f"kvferry-{named}"
    tree.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(
        ["git", "archive", named], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], check=True, input=archive)
    kind = "-DCMAKE_BUILD_TYPE=RelWithDebInfo"
    for command in (
        ["cmake", "-S", str(tree), "-B", str(tree / "build"), "-G", "Ninja", kind],
        ["cmake", "--build", str(tree / "build"), "--target", "kvferry"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return tree / "build" / "libkvferry.so", tree / "include" / "kvferry.h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="REVISION", help="measure that revision too")
    parser.add_argument("--library", type=Path, default=ROOT / "build/native/libkvferry.so")
    parser.add_argument("--header", type=Path, help="print the library's figures as JSON")
    given = parser.parse_args()
    if given.header:
        json.dump(measure(Library(given.library, given.header)), sys.stdout)
        return
    columns = {}
    if given.before:
        columns[given.before] = in_child(*build(given.before))
    columns["this tree"] = in_child(given.library, ROOT / "include/kvferry.h")
    print(f"{'':79}" + "".join(f"{name:>14}" for name in columns))
    for figure in columns["this tree"]:
        name, unit = figure.split(" | ")
        values = (column[figure] for column in columns.values())
        print(f"{name:55}{unit:24}" + "".join(f"{value:14.3f}" for value in values))


if __name__ == "__main__":
    main()
