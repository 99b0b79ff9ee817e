"""Writers that share a folder are killed: `python disk_killed.py 1000` for a long run."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from disk_parts import leftovers, make_part, occupied, occupied_at_once
from kvferry.store.disk import Disk

LIMIT = 3 << 20
SIZES = (100, 20_000, 150_000, 400_000)


def write_forever(folder: str, seed: int, limit: int) -> None:
    """Says the number of each part that the disk has."""
    chance = random.Random(seed)
    disk = Disk(folder, limit)
    print("open", flush=True)
    number, parent = 0, bytes(32)
    while True:
        number += 1
        part, data = make_part(number, chance.choice(SIZES), parent, seed)
        if disk.write(part, data):
            print(number, part.nbytes, flush=True)
            parent = part.key if chance.random() < 0.8 else bytes(32)
        if chance.random() < 0.5:
            for other in disk.list():
                memory = bytearray(other.nbytes)
                if disk.read_into(other, memory):
                    break


def start(folder: Path, seed: int, limit: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "write", str(folder), str(seed), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, kills: int, seed: int, limit: int = LIMIT) -> None:
    """Two writers at a time; the limit is looked at all the while."""
    chance = random.Random(seed)
    highest = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.is_set():
            highest = max(highest, occupied_at_once(folder))
            time.sleep(0.004)

    Disk(folder, limit).close()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for turn in range(0, kills, 2):
            writers = [start(folder, seed * 10_000 + turn + i, limit) for i in (0, 1)]
            said = []
            for writer in writers:
                assert writer.stdout is not None
                writer.stdout.readline()
            time.sleep(chance.random() * 0.15)
            for writer in writers:
                writer.kill()
            for i, writer in enumerate(writers):
                lines = writer.communicate()[0].splitlines(keepends=True)
                said.append(
                    (seed * 10_000 + turn + i, [line for line in lines if line[-1] == "\n"])
                )
            check(folder, limit, said)
    finally:
        ended.set()
        watcher.join()
    assert highest <= limit, f"{highest} of {limit}"


def check(folder: Path, limit: int, said: list[tuple[int, list[str]]]) -> None:
    disk = Disk(folder, limit)
    assert not leftovers(folder)
    report = disk.verify()
    assert report.quarantined == 0
    assert report.right == disk.stats().parts
    assert disk.stats().occupied == occupied(folder) <= limit
    evicted_any = limit < 1 << 30
    known = {part.key for part in disk.list()}
    for seed, lines in said:
        for line in lines:
            number, nbytes = map(int, line.split())
            part, _ = make_part(number, 0, seed=seed)
            assert evicted_any or part.key in known, "a part that was written is lost"
            if part.key in known:
                found = disk.find("block", part.key)
                assert found is not None
                memory = bytearray(found.nbytes)
                assert disk.read_into(found, memory)
                assert memory == make_part(number, nbytes, seed=seed)[1]
    disk.close()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_forever(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(int(sys.argv[1]) // 40):  # small folders, as each kill reads all
            run(Path(folder) / "evicting", 20, seed=2 * number)
            run(Path(folder) / "keeping", 20, seed=2 * number + 1, limit=8 << 30)
            shutil.rmtree(Path(folder) / "keeping")
