"""What goes wrong reaches the consumer, in time, and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._storage.readers import Slab, _Descriptor
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import CorruptChunkError
from tests import fresh
from tests.system.conftest import Load, descriptors, index_of, our_threads, sampler_for

pytestmark = pytest.mark.timeout(60)
EACH = {"threads": 2, "window": 1}


@pytest.fixture
def copied(atlas: Path, tmp_path: Path) -> Path:
    """An atlas that a test may damage."""
    shutil.copytree(atlas, tmp_path / "atlas")
    return tmp_path / "atlas"


def opened(path: Path) -> CellDataset:
    found = RaggedAtlas.checkout_latest(str(path)).query().to_cell_dataset()
    assert isinstance(found, CellDataset)
    return found


@pytest.fixture
def reads(dataset: CellDataset, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """``reads(before)``: calls ``before(number)`` ahead of every read of stored bytes, from 0 on."""

    def install(before: Callable[[int], None]) -> None:
        lock, count = threading.Lock(), iter(range(1 << 30))
        for kind in {type(dataset.open_reader(name)) for name in ("mmap", "preadv")}:
            read = kind.read

            def watched(self: Any, extents: Any, read: Any = read) -> Slab:
                with lock:
                    number = next(count)
                before(number)
                slab: Slab = read(self, extents)
                return slab

            monkeypatch.setattr(kind, "read", watched)

    return install


def consumed(batches: Iterator[Any], into: list[Any]) -> None:
    for batch in batches:
        into.append(index_of(batch))


def test_a_reader_that_fails(dataset: CellDataset, load: Load, reads: Any) -> None:
    def fail(number: int) -> None:
        if number >= 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "indices/c/7")

    reads(fail)
    sampler = sampler_for(dataset)
    batches = iter(load(dataset, sampler, **EACH))
    got: list[Any] = []
    with pytest.raises(OSError, match="indices/c/7") as raised:
        consumed(batches, got)
    assert raised.value.errno == errno.EIO
    assert got == [list(rows) for rows in sampler][: len(got)]  # in order up to there, nothing made up
    assert len(got) <= 4
    assert next(batches, None) is None
    del raised, batches
    gc.collect()
    assert not our_threads()


def test_a_reader_that_stalls_is_waited_for(dataset: CellDataset, load: Load, reads: Any) -> None:
    reads(lambda number: time.sleep(0.5 if number == 3 else 0))
    sampler = sampler_for(dataset)
    loader = load(dataset, sampler, **EACH)
    got: list[Any] = []
    consumed(iter(loader), got)
    assert got == [list(rows) for rows in sampler]
    assert loader.stats().stages["read"].seconds > 0.4
    loader.close()


def test_a_reader_that_stalls_too_long(dataset: CellDataset, load: Load, reads: Any) -> None:
    release = threading.Event()
    reads(lambda number: release.wait(30) if number == 3 else None)
    loader = load(dataset, sampler_for(dataset), timeout=0.5, **EACH)
    clock = time.perf_counter()
    try:
        with pytest.raises(TimeoutError, match="storage"):
            consumed(iter(loader), [])
        assert time.perf_counter() - clock < 10
    finally:
        release.set()  # storage answers at last: its thread ends
    end = time.monotonic() + 10
    while our_threads() and time.monotonic() < end:
        time.sleep(0.01)
    loader.close()


def test_a_reader_that_returns_short(copied: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what was asked for is read on; nothing at all, in the middle of a file, is an error."""
    dataset = opened(copied)
    sampler = sampler_for(dataset)
    preadv = os.preadv

    def half(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", half)
    with load(dataset, sampler, io="pinned", **EACH) as loader:
        got: list[Any] = []
        consumed(iter(loader), got)
        assert got == [list(rows) for rows in sampler]
        count = iter(range(1 << 30))
        monkeypatch.setattr(os, "preadv", lambda *read: preadv(*read) if next(count) < 10 else 0)
        with pytest.raises(CorruptChunkError, match="came to the end of the file"):
            consumed(iter(loader), got)


def test_a_file_that_is_cut_short_in_mid_epoch(
    copied: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(copied)
    reads: list[int] = []
    read = _Descriptor.read

    def shrinking(self: _Descriptor, vectors: list[memoryview], offset: int) -> bool:
        reads.append(offset)
        if len(reads) == 6:
            os.truncate(self._path, 100)
        return read(self, vectors, offset)

    monkeypatch.setattr(_Descriptor, "read", shrinking)
    with (
        load(dataset, sampler_for(dataset), io="pinned", **EACH) as loader,
        pytest.raises(CorruptChunkError, match="cut short"),
    ):
        consumed(iter(loader), [])


def test_a_chunk_that_turns_corrupt_in_mid_epoch(copied: Path, load: Load) -> None:
    dataset = opened(copied)
    sampler = sampler_for(dataset, shuffle=False)
    before = descriptors()
    order = [list(rows) for rows in sampler]
    folder = _last_layers(copied, dataset)
    with load(dataset, sampler, threads=1, window=1) as loader:
        batches = iter(loader)
        got = [index_of(next(batches))]
        # Values of the last group, which no batch that was made by now has touched.
        for file in folder.rglob("c/*"):
            _spoil(file)
        with pytest.raises(CorruptChunkError) as raised:
            consumed(batches, got)
        assert str(folder.relative_to(copied / "zarr_store")) in str(raised.value)
        assert got == order[: len(got)]
        assert len(got) < len(order)
        assert next(batches, None) is None
    del raised, batches
    dataset.close()
    gc.collect()
    assert not our_threads()
    assert descriptors() <= before


def _spoil(file: Path) -> None:
    """Overwrite a part of a file in place: who has it open or mapped sees it."""
    length = file.stat().st_size
    with file.open("r+b") as stored:
        stored.seek(length // 8)
        stored.write(np.full(length // 4, 0x5A, np.uint8).tobytes())


def _last_layers(atlas: Path, dataset: CellDataset) -> Path:
    """Layers of the group that the last rows lie in."""
    source = dataset._sources[int(dataset.groups_np[-1])]
    return atlas / "zarr_store" / source.name / "csr" / "layers"


def test_a_consumer_that_stops(dataset: CellDataset, load: Load) -> None:
    before = 0
    for _ in range(5):
        loader = load(dataset, sampler_for(dataset), **EACH)
        for batch in loader:
            assert len(batch["index"]) == 64
            break
        del loader, batch
        gc.collect()
        assert not our_threads()
        before = before or descriptors()
    assert descriptors() <= before


def test_a_consumer_that_fails(dataset: CellDataset, load: Load) -> None:
    def training_run(loader: Any) -> None:
        with loader:
            for _ in loader:
                raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError):
        training_run(load(dataset, sampler_for(dataset), **EACH))
    gc.collect()
    assert not our_threads()


SCRIPT = """
    import signal, sys, time

    # Whoever starts the tests in the background (nohup, &) has SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    from pathlib import Path
    from hbx_gpu.atlas import RaggedAtlas
    from tests.system.conftest import sampler_for, ways

    dataset = RaggedAtlas.checkout_latest(sys.argv[1]).query().to_cell_dataset()
    loader = ways(sys.argv[2])(dataset, sampler_for(dataset), threads=2, window=1)
    if sys.argv[3] == "waiting":
        make = loader.feed.make
        loader.feed.make = lambda rows: (time.sleep(0.3), make(rows))[1]
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        epoch += 1
        for batch in loader:
            print("batch", flush=True)
            if sys.argv[3] == "training":
                time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_training_run(atlas: Path, way: str) -> None:
    """While it waits for a batch."""
    _ends_by_ctrl_c(atlas, way, "waiting")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_while_the_consumer_computes(atlas: Path) -> None:
    """No call into the loader is under way then, whatever hands its batches over."""
    _ends_by_ctrl_c(atlas, "direct", "training")


def _ends_by_ctrl_c(atlas: Path, way: str, state: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(atlas), way, state]
    root = Path(__file__).resolve().parents[2]
    with fresh.popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline() == "batch\n"
            process.send_signal(signal.SIGINT)
            # It ends by itself, at this machine's pace; pytest-timeout ends one that hangs.
            _, err = process.communicate()
        finally:
            process.kill()
    assert "KeyboardInterrupt" in err
    assert process.returncode in (130, -signal.SIGINT)
    assert "Segmentation" not in err
