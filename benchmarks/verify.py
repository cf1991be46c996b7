"""`hbx-gpu verify` beside reading the same files and computing their CRC32C: ``python -m benchmarks.verify``.

Both run in turns, several times, with the same number of threads; the quickest time of each counts. CPU
seconds are those of the whole process, so they say more than wall times where other programs run. What the
first run of a process takes beside that, for imports and compiled code, does not count.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from benchmarks.common import conditions
from hbx_gpu._bench.machine import describe
from hbx_gpu._verify.dataset import Level
from hbx_gpu._verify.stores import verify

_AT_ONCE = 4 << 20


def read_and_sum(folder: Path, threads: int) -> int:
    """Read all files below a folder in pieces of 4 MiB, with a checksum of each; the bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, _AT_ONCE)]

    def share(number: int) -> int:
        buffer, nbytes = np.empty(_AT_ONCE, np.uint8), 0
        for path, at in pieces[number::threads]:
            descriptor = os.open(path, os.O_RDONLY)
            found = os.preadv(descriptor, [buffer.data], at)
            os.close(descriptor)
            google_crc32c.value(buffer[:found])
            nbytes += found
        return nbytes

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(share, range(threads)))


def whole(folder: Path, level: Level, threads: int) -> int:
    """Verify a store that is whole; the bytes of chunks."""
    read: list[int] = []
    for verdict in verify(folder, level, threads=threads, progress=read.append):
        if verdict.damage:
            raise SystemExit(f"{folder} is damaged: {verdict.damage[0]}")
    return sum(read)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Result, wall seconds and CPU seconds."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - begin, time.process_time() - cpu


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__)
    parser.add_argument("stores", type=Path, nargs="+", metavar="ATLAS_OR_ARCHIVE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print(
        f"{platform.machine()}, {args.threads} threads, files in the page cache, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(describe(conditions()))
    for store in args.stores:
        levels: tuple[Level, ...] = ("fast", "checksums", "full")
        for level in levels:
            whole(store, level, args.threads)  # compiles, and brings the files into the page cache
            turns = [
                (
                    timed(lambda store=store: read_and_sum(store, args.threads)),  # type: ignore[misc]
                    timed(lambda store=store, level=level: whole(store, level, args.threads)),  # type: ignore[misc]
                )
                for _ in range(args.rounds)
            ]
            nbytes = turns[0][0][0]
            wall, cpu = (min(plain[k] for plain, _ in turns) for k in (1, 2))
            our_wall, our_cpu = (min(ours[k] for _, ours in turns) for k in (1, 2))
            print(
                f"{store.name} {level:9s} {nbytes / 1e6:8,.1f} MB: "
                f"read + CRC {wall:.3f} s ({cpu:.3f} CPU s), "
                f"verify {our_wall:.3f} s ({our_cpu:.3f} CPU s), "
                f"{wall / our_wall:.0%} of its rate ({cpu / our_cpu:.0%} by CPU)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
