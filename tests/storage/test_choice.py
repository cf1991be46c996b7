"""Which reader is fastest: measured with a clock that candidates turn themselves."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from hbx_gpu._storage.choice import check_io, fastest, open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.pinned import PinnedReader
from hbx_gpu._storage.readers import MmapReader, PreadReader, Reader


def test_the_fastest_reader_is_found_on_rows_that_nobody_read_before() -> None:
    seen: list[int] = []
    now = 0.0
    lock = threading.Lock()

    def candidate(cost: float) -> Any:
        def bring(rows: np.ndarray) -> None:
            nonlocal now
            with lock:
                seen.extend(rows.tolist())
                now += cost * len(rows)

        return bring

    makers = {"mmap": candidate(3e-5), "pinned": candidate(1e-5), "kvikio": candidate(2e-5)}
    name, cost = fastest(makers, 1_000_000, threads=2, seconds=0.02, clock=lambda: now)
    assert name == "pinned"
    assert {key: round(value * 1e6) for key, value in cost.items()} == {
        "mmap": 30,
        "pinned": 10,
        "kvikio": 20,
    }
    assert len(seen) == len(set(seen))
    # A difference within noise does not count.
    makers = {"mmap": candidate(1.05e-5), "pinned": candidate(1e-5)}
    assert fastest(makers, 10_000, threads=1, seconds=0.02, clock=lambda: now)[0] == "mmap"


def test_a_round_reads_about_a_quarter_of_the_rows() -> None:
    seen: list[int] = []
    fastest({"mmap": seen.extend, "pinned": seen.extend}, 6400, threads=8, seconds=0.0)
    assert 0.25 * 6400 <= len(seen) <= 0.3 * 6400


@pytest.mark.parametrize("n_rows", [0, 1, 5])
def test_few_rows_to_measure_on(n_rows: int) -> None:
    name, _ = fastest({"mmap": len, "pinned": len}, n_rows, threads=2, seconds=0.0)
    assert name in ("mmap", "pinned")


def test_names() -> None:
    assert check_io("kvikio") == "kvikio"
    with pytest.raises(ValueError, match="'auto', 'mmap', 'pinned', 'kvikio', got 'gds'"):
        check_io("gds")


@pytest.mark.parametrize(
    ("kind", "reader"), [("mmap", MmapReader), ("preadv", PreadReader), ("pinned", PinnedReader)]
)
def test_readers_by_name(kind: str, reader: type[Reader]) -> None:
    assert type(open_reader(kind, ChunkDirectory([]))) is reader


def test_a_reader_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown reader 'gds'; there are mmap, preadv, pinned"):
        open_reader("gds", ChunkDirectory([]))
