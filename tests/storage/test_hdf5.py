"""HDF5 datasets read without the HDF5 library: equal to h5py for every storage that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._storage import ChunkDirectory, open_reader
from hbx_gpu._storage.chunks import chunk_grid
from hbx_gpu._storage.hdf5 import hdf5_layout
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedCodecError


def read(path: Path, name: str) -> np.ndarray:
    """A whole dataset through layout, directory, reader and codec."""
    with h5py.File(path) as file:
        layout = hdf5_layout(file[name], path, name)
    directory = ChunkDirectory([layout])
    slab = open_reader("mmap", directory).read(directory.extents(np.arange(directory.base[-1])))
    codec, grid = ChunkCodec(layout), chunk_grid(layout)
    whole = np.empty([n * c for n, c in zip(grid, layout.chunk_shape, strict=True)], layout.dtype)
    for number, where in enumerate(np.ndindex(*grid)):
        absent = slab.address[number] == 0
        values = (
            layout.fill_value
            if absent
            else codec.decode(slab.view(number), directory.skipped_filters(number))
        )
        begin = [w * c for w, c in zip(where, layout.chunk_shape, strict=True)]
        size = layout.chunk_shape if absent else np.shape(values)
        whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] = values
    return whole[tuple(slice(0, n) for n in layout.shape)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from(["u1", "<i4", ">i4", "<u2", ">f4", "<f8", ">i8", "?"]),
    compression=st.sampled_from([None, "gzip", "lzf"]),
    shuffle=st.booleans(),
    fletcher32=st.booleans(),
    userblock=st.sampled_from([0, 512, 2048]),
    libver=st.sampled_from(["earliest", "latest"]),
    hard=st.booleans(),
)
def test_equals_h5py(
    tmp_path: Path,
    data: st.DataObject,
    dtype: str,
    compression: str | None,
    shuffle: bool,
    fletcher32: bool,
    userblock: int,
    libver: str,
    hard: bool,
) -> None:
    """Contiguous and chunked, in one and two dimensions; filters are skipped for `hard` values."""
    shape = tuple(data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=2)))
    chunked = compression is not None or shuffle or fletcher32 or data.draw(st.booleans())
    chunks = tuple(data.draw(st.integers(1, 70)) for _ in shape) if chunked and min(shape) > 0 else None
    options: dict[str, Any] = {}
    if chunks is not None:
        chunks = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
        options = {"compression": compression, "shuffle": shuffle, "fletcher32": fletcher32}
    rng = np.random.default_rng(len(shape))
    values = rng.integers(0, 2**60 if hard else 4, shape).astype(dtype)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=userblock, libver=libver) as file:
        file.create_dataset("a", data=values, chunks=chunks, **options)
        file.create_dataset("b", data=values[::-1], chunks=chunks, **options)
    for name, expected in (("a", values), ("b", values[::-1])):
        found = read(path, name)
        assert found.dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)


def test_chunks_that_were_never_written_are_fill_value(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", shape=(1_000,), chunks=(100,), dtype="i4", fillvalue=7)[250:320] = 1
    found = read(path, "a")
    assert (found == np.where((np.arange(1_000) >= 250) & (np.arange(1_000) < 320), 1, 7)).all()


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.arange(1_000), chunks=(100,), compression="gzip")
        file.create_dataset("b", data=np.arange(1_000))
    with h5py.File(path) as file:
        layouts = [hdf5_layout(file[name], path, name) for name in ("a", "b")]
    directory = ChunkDirectory(layouts)
    first = np.array([0, directory.base[1]])
    directory.extents(first)
    with h5py.File(path, "a") as file:
        file["a"][:] = 5
    for chunk in first:
        with pytest.raises(CorruptChunkError, match="changed by another program"):
            directory.extents(np.array([chunk]))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.arange(10_000), chunks=(1_000,))
        file.create_dataset("b", data=np.arange(10_000))
    with h5py.File(path) as file:
        size = path.stat().st_size
        with path.open("r+b") as raw:
            raw.truncate(size - 30_000)
        layout = hdf5_layout(file["a"], path, "a")
        with pytest.raises(CorruptDataError, match="cut short"):
            hdf5_layout(file["b"], path, "b")
    directory = ChunkDirectory([layout])
    with path.open("r+b") as raw:
        raw.truncate(1_000)
    with pytest.raises(CorruptChunkError):
        directory.extents(np.arange(directory.base[-1]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scaleoffset": 0}, "scaleoffset"),
        ({"dtype": h5py.string_dtype()}, "arrays of numbers"),
        *(
            ({"compression": code, "allow_unknown_filter": True}, rf"the filter {name} \({code}\)")
            for code, name in {
                307: "bzip2",
                32004: "lz4",
                32008: "bitshuffle",
                32013: "zfp",
                32026: "blosc2",
                40000: "of number",
            }.items()
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", shape=(100,), **{"dtype": "i4", "chunks": (10,), **options})
    with h5py.File(path) as file, pytest.raises(UnsupportedCodecError, match=match):
        hdf5_layout(file["a"], path, "a")
