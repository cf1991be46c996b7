"""Every array that we write is checked: one altered byte of any chunk, in any codec, is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu.atlas._writing.arrays import codec_names
from hbx_gpu.errors import CorruptChunkError
from tests.emulation.backend import EmulatedBackend
from tests.engine.checked_groups import N_ROWS, opened, write


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
