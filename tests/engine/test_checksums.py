"""Every array that we write is checked: one altered byte of any chunk, in any codec, is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage import read_layout
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._writing.arrays import SparseGroupWriter, codec_names
from hbx_gpu.errors import CorruptChunkError
from tests.emulation.backend import EmulatedBackend

CHUNK, N_ROWS, N_GENES = 128, 60, 50
SPACE = get_space("gene_expression")


def write(folder: Path, codec: str, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A group of random rows, and what it holds: columns, values, offsets."""
    rng = np.random.default_rng(7)
    counts = rng.integers(3, 12, N_ROWS)
    indices = np.concatenate([np.sort(rng.choice(N_GENES, n, replace=False)) for n in counts]).astype("u4")
    values = rng.integers(1, 200, len(indices)).astype(dtype)
    writer = SparseGroupWriter(
        folder, SPACE, layers={"counts": dtype}, codec=codec, chunk=CHUNK, shard=8 * CHUNK
    )
    writer.append(indices, {"counts": values})
    writer.close()
    return indices, values, np.concatenate([[0], np.cumsum(counts)])


def opened(folder: Path, offsets: np.ndarray) -> CellDataset:
    source = Source(
        "g",
        read_layout(folder / "csr/indices", absent_is_fill=False),
        {"counts": read_layout(folder / "csr/layers/counts", absent_is_fill=False)},
        np.arange(N_GENES, dtype=np.int32),
    )
    start, length = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int32)
    rows = RowIndex(np.zeros(N_ROWS, np.int32), start, length)
    names = np.array([f"g{i}" for i in range(N_GENES)], object)
    return CellDataset([source], rows, layer=["counts"], n_features=N_GENES, feature_uids=names)


def on_host(dataset: CellDataset) -> tuple[np.ndarray, np.ndarray]:
    batch = dataset[np.arange(N_ROWS)]
    return np.asarray(batch.indices), np.asarray(batch.values)


def chunk_bytes(folder: Path) -> list[tuple[Path, int]]:
    """(file, bytes of its chunks) of both arrays."""
    files = sorted(folder.rglob("c/0"))
    assert len(files) == 2
    return [(file, file.stat().st_size - 16 * 8 - 4) for file in files]


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("dtype", ["uint32", "float32"])
def test_one_altered_byte_is_found(tmp_path: Path, codec: str, dtype: str) -> None:
    indices, values, offsets = write(tmp_path, codec, dtype)
    found = on_host(opened(tmp_path, offsets))
    np.testing.assert_array_equal(found[0], indices)
    np.testing.assert_array_equal(found[1], values)
    rng = np.random.default_rng(3)
    for file, size in chunk_bytes(tmp_path):
        whole = file.read_bytes()
        for at in sorted({0, size - 1, *rng.integers(0, size, 30).tolist()}):
            altered = bytearray(whole)
            altered[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(altered)
            with pytest.raises(CorruptChunkError):
                on_host(opened(tmp_path, offsets))
        file.write_bytes(whole)


@pytest.mark.parametrize("codec", ["homeobox.bitpacking", "none", "zstd"])
def test_a_device_finds_it_too(tmp_path: Path, codec: str) -> None:
    indices, values, offsets = write(tmp_path, codec, "uint32")

    def on_device() -> tuple[Any, Any]:
        dataset = opened(tmp_path, offsets)
        engine = dataset.device_engine(EmulatedBackend())
        plan, slab = dataset.read(np.arange(N_ROWS))
        columns, layers, _ = engine.csr(plan, slab)
        return columns, layers[0]

    for mine, true in zip(on_device(), (indices, values), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), true)
    for file, size in chunk_bytes(tmp_path):
        whole = file.read_bytes()
        for at in (0, size // 2, size - 1):
            altered = bytearray(whole)
            altered[at] ^= 1
            file.write_bytes(altered)
            with pytest.raises(CorruptChunkError):
                on_device()
        file.write_bytes(whole)


@pytest.mark.parametrize("codec", [name for name in codec_names() if name != "hbx_gpu.rowpack"])
def test_zarr_reads_and_verifies_them(tmp_path: Path, codec: str) -> None:
    import zarr

    indices, _, _ = write(tmp_path, codec, "uint32")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "csr/indices", mode="r")[:], indices)
    file, size = chunk_bytes(tmp_path)[0]
    altered = bytearray(file.read_bytes())
    altered[size - 1] ^= 1
    file.write_bytes(altered)
    with pytest.raises(ValueError, match=r"(?i)checksum|crc"):
        zarr.open_array(file.parents[1], mode="r")[:]
