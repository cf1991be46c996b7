"""The kvikio reader without kvikio: a stand-in reads with preadv, into memory that stands for a device's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu._storage import kvikio
from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.kvikio import PAGE, KvikioReader
from hbx_gpu._storage.readers import PreadReader
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError
from hbx_gpu.testing import example_groups, write_sources
from tests.emulation.backend import JUNK, Arena
from tests.storage.kvikio_stand_in import StandIn


def directory_of(root: Path, **kwargs: Any) -> ChunkDirectory:
    groups = example_groups(200)
    for group in groups:
        group.codec = "hbx_gpu.rowpack"
        for name, value in kwargs.items():
            setattr(group, name, value)
    sources, _ = write_sources(root, groups)
    return ChunkDirectory([layout for s in sources for layout in (s.index, s.layers["counts"]) if layout])


@pytest.fixture(params=[0, 4], ids=["plain", "sharded"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> ChunkDirectory:
    return directory_of(tmp_path, chunks_per_shard=request.param)


def all_extents(directory: ChunkDirectory) -> Extents:
    return directory.extents(np.arange(directory.base[-1]))


def stand_in(directory: ChunkDirectory, **options: Any) -> tuple[KvikioReader, list[StandIn]]:
    opened: list[StandIn] = []
    faults = {name: options.pop(name) for name in ("short", "error") if name in options}

    def open_file(path: str) -> StandIn:
        opened.append(StandIn(path, **faults))
        return opened[-1]

    return KvikioReader(directory, open_file=open_file, **options), opened


def test_the_same_bytes_as_preadv(directory: ChunkDirectory) -> None:
    reader, opened = stand_in(directory)
    order = np.random.default_rng(1).permutation(int(directory.base[-1]))
    extents = directory.extents(np.append(order, order[:5]))  # repeats too
    found, expected = reader.read(extents), PreadReader(directory).read(extents)
    assert np.array_equal(found.nbytes, expected.nbytes)
    for i in np.flatnonzero(extents.nbytes > 0).tolist():
        assert np.array_equal(found.view(i), expected.view(i))
    assert len(opened) == len({file for file in extents.file.tolist() if file >= 0})
    reader.read(extents)
    assert len(opened) == len(directory.paths)  # files are kept open
    files = list(opened)
    reader.close()
    assert all(file.closed for file in files)


def test_into_device_memory(directory: ChunkDirectory) -> None:
    """Slots are aligned; bytes that belong to no read are not touched."""
    reader, _ = stand_in(directory, max_gap=0, max_size=3000)
    extents = all_extents(directory)
    placed = reader.place(extents)
    arena = Arena(placed.size + 2 * PAGE)
    skip = -arena.address % PAGE
    reader.read_into(placed, arena.array(skip, placed.size))
    assert (arena.memory[:skip] == JUNK).all()
    assert (arena.memory[skip + placed.size :] == JUNK).all()
    expected = PreadReader(directory).read(extents)
    for i in np.flatnonzero(extents.nbytes > 0).tolist():
        at = skip + int(placed.at[i])
        assert np.array_equal(arena.memory[at : at + int(extents.nbytes[i])], expected.view(i))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60_000), st.integers(-1, 9_000)), max_size=40),
    st.integers(0, 9_000),
    st.integers(1, 40_000),
)
def test_placing(wanted: list[tuple[int, int, int]], max_gap: int, max_size: int) -> None:
    file, offset, nbytes = (np.array([w[k] for w in wanted], np.int64) for k in range(3))
    reader = KvikioReader(ChunkDirectory([]), open_file=StandIn, max_gap=max_gap, max_size=max_size)
    placed = reader.place(Extents(file.astype(np.int32), offset, nbytes))
    for values in (placed.offset, placed.nbytes, placed.slot):
        assert (values % PAGE == 0).all()
    # Slots lie side by side, and every extent inside the slot of a read of its file.
    assert np.array_equal(placed.slot, np.cumsum(placed.nbytes) - placed.nbytes)
    assert placed.size == placed.nbytes.sum()
    for f, o, n, at in zip(file, offset, nbytes, placed.at, strict=True):
        if n <= 0:
            continue
        i = int(np.searchsorted(placed.slot, at, "right")) - 1
        assert placed.file[i] == f
        assert placed.offset[i] + at - placed.slot[i] == o
        assert at - placed.slot[i] + n <= placed.needed[i] <= placed.nbytes[i]
    assert len(placed.file) <= (nbytes > 0).sum()
    if max_gap == 0 and len(placed.file):
        assert (placed.nbytes - placed.needed < PAGE).all()


def test_neighbors_are_read_at_once(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, chunks_per_shard=8)
    reader, opened = stand_in(directory)
    extents = all_extents(directory)
    reader.read(extents)
    assert sum(file.reads for file in opened) == len(opened) < len(extents)
    small, opened = stand_in(directory, max_size=1, max_gap=0)
    small.read(extents)
    assert sum(file.reads for file in opened) == (extents.nbytes > 0).sum()


def test_a_short_read_is_an_error(directory: ChunkDirectory) -> None:
    reader, _ = stand_in(directory, short=100)
    with pytest.raises(OSError, match=r"kvikio read \d+ of \d+ bytes of .*pinned"):
        reader.read(all_extents(directory))


def test_a_failing_read_names_the_file_and_waits_for_the_others(directory: ChunkDirectory) -> None:
    reader, opened = stand_in(directory)
    extents = all_extents(directory)
    reader.read(extents)
    opened[1].error = "cuFile says no"
    before = [file.done for file in opened]
    with pytest.raises(OSError, match="cuFile says no") as raised:
        reader.read(extents)
    assert opened[1].path in str(raised.value)
    for i, file in enumerate(opened):
        assert file.done - before[i] == (0 if i == 1 else file.reads // 2)
    opened[1].error = ""
    reader.read(extents)


def test_files_that_changed(tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    extents = all_extents(directory)
    path = Path(directory.paths[0])
    whole = path.read_bytes()

    reader, _ = stand_in(directory)
    with open(path, "r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(CorruptChunkError, match="cut short"):
        reader.read(extents)

    reader, _ = stand_in(directory)
    path.unlink()
    with pytest.raises(CorruptChunkError, match="missing"):
        reader.read(extents)

    reader, _ = stand_in(directory)
    (tmp_path / "other").write_bytes(whole)
    os.replace(tmp_path / "other", path)
    with pytest.raises(CorruptChunkError, match="replaced"):
        reader.read(extents)


def test_threads_share_a_reader(directory: ChunkDirectory) -> None:
    reader, _ = stand_in(directory)
    extents = all_extents(directory)
    expected = PreadReader(directory).read(extents)
    with ThreadPoolExecutor(4) as pool:
        slabs = list(pool.map(reader.read, [extents] * 12))
    for slab in slabs:
        assert all(np.array_equal(slab.view(i), expected.view(i)) for i in range(len(extents)))


def test_it_pickles_as_its_options(directory: ChunkDirectory) -> None:
    reader = KvikioReader(directory, open_file=StandIn, max_size=1234)
    other = pickle.loads(pickle.dumps(reader))
    assert other._max_size == 1234
    found, expected = (r.read(all_extents(r.directory)) for r in (other, reader))
    assert np.array_equal(found.view(0), expected.view(0))


def test_a_fork_after_the_first_read_is_refused(
    directory: ChunkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = stand_in(directory)
    extents = all_extents(directory)
    reader.read(extents)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="spawn"):
        reader.read(extents)


def test_without_kvikio_or_driver_it_says_what_is_missing(
    directory: ChunkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'hbx_gpu\[gpu\]'"):
        KvikioReader(directory)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())

    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_driver)
    with pytest.raises(DeviceUnavailableError, match="driver"):
        KvikioReader(directory)


def test_kvikio_is_set_up_by_the_first_read(
    directory: ChunkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    settings: list[dict[str, int]] = []
    module, defaults = types.ModuleType("kvikio"), types.ModuleType("kvikio.defaults")
    module.CuFile, module.defaults, defaults.set = StandIn, defaults, settings.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)
    monkeypatch.setattr(kvikio, "missing", lambda: None)
    reader = KvikioReader(directory, threads=7, task_bytes=1 << 20)
    assert settings == []
    reader.read(all_extents(directory))
    reader.read(all_extents(directory))
    assert settings == [{"num_threads": 7, "task_size": 1 << 20}]


def test_importing_calls_nothing_of_kvikio() -> None:
    code = "import sys, hbx_gpu._storage.kvikio; sys.exit('kvikio' in sys.modules or 'cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
