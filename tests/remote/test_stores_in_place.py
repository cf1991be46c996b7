"""Stores of other programs and SCDL archives in object storage hold what they hold on a disk."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import hbx_gpu
from hbx_gpu._inplace.cells import Cells
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptChunkError, HbxError, UnsupportedError
from hbx_gpu.synthetic import write_h5ad
from tests.remote.range_server import RangeServer
from tests.remote.test_atlases import content

# Each shows another way of storing; the slow test reads all of them.
SOME = [
    "zarr_ad013_default_multichunk", "zarr_ad013_not_consolidated", "zarr_ad012_v2_default", "zarr_ad06_v2",
    "zarr_ad013_v3_blosc_lz4_sharded", "annbatch031_three_datasets", "h5ad_ad013_gzip_raw_layers",
    "h5ad_dense_contiguous", "h5mu_mudata041", "muzarr_mudata041", "tenx_v3_gex_adt", "loom_loompy",
    "bad_h5ad_truncated_half", "bad_zarr_v3_truncated_shard", "bad_zarr_v2_missing_chunk_indices",
]  # fmt: skip
ARCHIVES = ["single_f32", "ragged_two", "merge_blocks", "legacy_v007", "empty_rows", "stale_cast"]


def held(path: object, options: dict[str, str] | None = None) -> list[object]:
    """What a query over a store holds; the kind of the error where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            query = hbx_gpu.open(str(path), storage_options=options)
            assert isinstance(query, Cells)
            dataset = query.to_cell_dataset()
            found = content(dataset)
        except (HbxError, ValueError) as error:
            return [type(error).__name__]
    parts = found if isinstance(found, list) else [found]
    return [len(dataset), list(dataset.feature_uids), query.to_pandas(), *parts]


def assert_equal(here: list[object], there: list[object]) -> None:
    assert len(here) == len(there), (here[:1], there[:1])
    for a, b in zip(here, there, strict=True):
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        elif isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame):
            pd.testing.assert_frame_equal(a, b)
        else:
            assert a == b


def stores_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix not in (".json", ".npz"))


@pytest.mark.parametrize("name", SOME)
def test_stores_are_the_same(shared: Path, name: str) -> None:
    fixtures = shared / "fixtures" / "inplace"
    with RangeServer(fixtures) as server:
        for path in stores_of(fixtures / name):
            assert_equal(held(path), held(f"s3://{name}/{path.name}", server.s3_options))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* share their name with another cell")
def test_all_stores_are_the_same(shared: Path) -> None:
    fixtures = shared / "fixtures" / "inplace"
    with RangeServer(fixtures) as server:
        for folder in sorted(path for path in fixtures.iterdir() if path.is_dir()):
            for path in stores_of(folder):
                assert_equal(held(path), held(f"s3://{folder.name}/{path.name}", server.s3_options))


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_the_same(shared: Path, name: str) -> None:
    fixtures = shared / "fixtures" / "scdl"
    with RangeServer(fixtures) as server:
        for path in [p for p in (fixtures / name).iterdir() if (p / "row_ptr.npy").exists()]:
            here, there = held(path), held(f"s3://{name}/{path.name}", server.s3_options)
            assert_equal(here, there)


def test_a_file_and_consolidated_metadata_need_no_listing(shared: Path) -> None:
    fixtures = shared / "fixtures" / "inplace"
    with RangeServer(fixtures) as server:
        options = {"allow_http": "true"}
        for name in ("h5ad_ad013_gzip_raw_layers", "zarr_ad013_default_multichunk"):
            path = stores_of(fixtures / name)[0]
            assert_equal(held(path), held(f"{server.url}/{name}/{path.name}", options))
        name = "zarr_ad013_not_consolidated"
        path = stores_of(fixtures / name)[0]
        with pytest.raises(UnsupportedError, match="cannot list"):
            hbx_gpu.open(f"{server.url}/{name}/{path.name}", storage_options=options)


def test_a_file_that_is_replaced_is_an_error(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "served" / "b" / "store.h5ad"
    path.parent.mkdir(parents=True)
    shutil.copy(shared / "fixtures" / "inplace" / "h5ad_ad013_gzip_raw_layers" / "store.h5ad", path)
    path.chmod(0o644)
    with RangeServer(tmp_path / "served") as server:
        query = hbx_gpu.open("s3://b/store.h5ad", storage_options=server.s3_options)
        dataset = query.to_cell_dataset()
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(CorruptChunkError, match="changed by another program"):
            dataset.__getitems__(np.arange(len(dataset)))


def test_a_file_that_was_replaced_is_read_anew_through_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "served" / "b" / "cells.h5ad"
    path.parent.mkdir(parents=True)
    write_h5ad(path, 20, 30, compression=None)
    size = path.stat().st_size
    with RangeServer(tmp_path / "served") as server:

        def values() -> np.ndarray:
            query = hbx_gpu.open(
                "s3://b/cells.h5ad", storage_options=server.s3_options, cache=tmp_path / "cache"
            )
            batch = query.to_cell_dataset().__getitems__(np.arange(20))
            assert isinstance(batch, SparseBatch)
            return batch.values.copy()

        before = values()
        with h5py.File(path, "r+") as file:
            file["X/data"][:] += 1
        assert path.stat().st_size == size
        np.testing.assert_array_equal(values(), before + 1)


def test_ranges_with_small_gaps_come_in_one_request(tmp_path: Path) -> None:
    # What requests cost is measured by bucket, so no other test may use this one.
    path = tmp_path / "served" / "near" / "cells.h5ad"
    path.parent.mkdir(parents=True)
    write_h5ad(path, 4000, 300, compression=None)
    with RangeServer(tmp_path / "served") as server:
        dataset = hbx_gpu.open("s3://near/cells.h5ad", storage_options=server.s3_options).to_cell_dataset()
        asked = len(server.requests(part="cells.h5ad"))
        dataset.__getitems__(np.array([0, 3999]))  # the first and the last chunk of both arrays
        assert len(server.requests(part="cells.h5ad")) - asked == 2
