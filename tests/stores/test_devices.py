"""Stores in place through the emulated device: the batches of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import hbx_gpu
from hbx_gpu import CellSampler
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from tests.emulation.backend import EmulatedBackend
from tests.stores.small import put, small, written
from tests.test_device_loader import brought, on_cpu, same

COMPRESSORS = {
    "zstd": zarr.codecs.ZstdCodec(),
    "blosc-lz4": zarr.codecs.BloscCodec(cname="lz4"),
    "gzip": zarr.codecs.GzipCodec(),
    "none": None,
}


@pytest.mark.parametrize("store", ["h5ad", "h5ad-gzip", *COMPRESSORS])
def test_a_device_gives_the_batches_of_the_host(tmp_path: Path, store: str) -> None:
    data = small(40, 30)
    path = tmp_path / "store"
    if store.startswith("h5ad"):
        data.write_h5ad(path, compression="gzip" if store.endswith("gzip") else None)
    else:
        root = written(path, data)
        for name in ("data", "indices"):
            put(root, f"X/{name}", getattr(data.X, name), chunks=(50,), compressors=COMPRESSORS[store])
    dataset: Any = hbx_gpu.open(path).to_cell_dataset()

    def sampler() -> CellSampler:
        return CellSampler(dataset.groups_np, batch_size=16, seed=1)

    expected = on_cpu(dataset, sampler(), layout="dense", executor="direct")
    loader = device_loader(dataset, sampler(), EmulatedBackend(), LoaderOptions(layout="dense", threads=2))
    found = brought(loader)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    rows = np.concatenate([np.asarray(batch["X"]) for batch in expected])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, data.X.toarray().tolist()))
