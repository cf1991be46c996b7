"""Two hundred epochs: nothing grows."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

import psutil
import pytest

from hbx_gpu.dataloader import CellDataset
from tests.system.conftest import descriptors, needs_dali, sampler_for, ways

EPOCHS, SETTLED = 200, 50


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("way", "layout"),
    [
        ("direct", "dense"),
        ("direct", "csr"),
        ("emulated device", "csr"),
        pytest.param("emulated device", "dense", marks=pytest.mark.long),
        pytest.param("dali", "dense", marks=needs_dali),
        pytest.param("dali", "csr", marks=[needs_dali, pytest.mark.long]),
        *(
            pytest.param(way, layout, marks=[pytest.mark.gpu, *[needs_dali][: way == "cuda dali"]])
            for way in ("cuda direct", "cuda dali")
            for layout in ("dense", "csr")
        ),
    ],
)
def test_nothing_grows(dataset: CellDataset, way: str, layout: str) -> None:
    process = psutil.Process()
    sampler = sampler_for(dataset, batch_size=125)
    begin: tuple[int, int, int] | None = None
    cells = 0
    with ways(way)(dataset, sampler, layout=layout) as loader:
        for epoch in range(EPOCHS):
            loader.set_epoch(epoch)
            for number, batch in enumerate(loader):
                cells += len(batch["index"])
                if epoch % 10 == 3 and number == 1:
                    break  # a consumer that has had enough
            if epoch % 10 == 7:
                loader.load_state_dict(loader.state_dict())
            batch = None
            if epoch in (SETTLED, EPOCHS - 1):
                gc.collect()
                _give_back()
                now = process.memory_info().rss, _threads(), descriptors()
                begin = begin or now
    assert begin is not None
    assert cells == EPOCHS * len(dataset) - EPOCHS // 10 * (len(dataset) - 250)
    assert now[0] - begin[0] < 6 << 20  # one batch kept per epoch comes to 5 MB dense, one epoch to 22 MB
    assert now[1] <= begin[1]
    assert now[2] <= begin[2]


def _give_back() -> None:
    """Let the allocator return free memory to the system, so that what tests before left is not counted."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _threads() -> int:
    """Threads, once those of the last epoch are gone."""
    end = time.monotonic() + 2
    while (found := threading.active_count()) > 1 and time.monotonic() < end:
        if not any(thread.name.startswith("hbx_gpu") for thread in threading.enumerate()):
            break
        time.sleep(0.01)
    return found
