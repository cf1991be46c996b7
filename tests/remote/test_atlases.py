"""Atlases in object storage hold what they hold on a disk, and what changes under a reader is an error."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu._datasets.stored import AnyStored
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main
from hbx_gpu.dataloader import make_loader
from hbx_gpu.errors import CorruptChunkError, HbxError, UnsupportedError
from hbx_gpu.synthetic import write_h5ad
from tests.remote.objects import upload
from tests.remote.range_server import KINDS, PASSING, Kind, RangeServer, at_random
from tests.remote.weed import Bucket

ATLASES = [
    "all_spaces", "cite_multimodal", "image_tiles", "legacy_0_2_3", "missing_shards", "ragged_rna",
    "seed_2026_05", "single_rna", "uid_collision",
]  # fmt: skip


def datasets(path: object, options: dict[str, str] | None = None) -> dict[tuple[str, str], AnyStored | str]:
    """All fields of all tables of an atlas; where one cannot be opened, the kind of the error."""
    atlas = RaggedAtlas.checkout_latest(str(path), storage_options=options)
    found: dict[tuple[str, str], AnyStored | str] = {}
    for table in atlas.obs_tables:
        for field in atlas.pointer_fields:
            try:
                found[table, field] = atlas.query(table).to_cell_dataset(field_name=field)
            except HbxError as error:
                found[table, field] = type(error).__name__
    return found


def content(dataset: AnyStored) -> list[np.ndarray] | str:
    """Everything that batches of a dataset hold, in their order."""
    try:
        batch = dataset.__getitems__(np.arange(len(dataset)))
    except HbxError as error:
        return type(error).__name__
    parts = [getattr(batch, name, None) for name in ("offsets", "indices", "values", "data")]
    found = [part for part in parts if part is not None]
    # Boxes of several sizes come as a list.
    return [np.asarray(one) for part in found for one in (part if isinstance(part, list) else [part])]


def assert_same(here: AnyStored, there: AnyStored) -> None:
    a, b = content(here), content(there)
    if isinstance(a, str) or isinstance(b, str):
        assert a == b
        return
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


@pytest.mark.parametrize("name", ATLASES)
def test_real_atlases_are_the_same(homeobox_fixtures: Path, name: str) -> None:
    with RangeServer(homeobox_fixtures / name) as server:
        here = datasets(homeobox_fixtures / name / "atlas")
        there = datasets("s3://atlas", server.s3_options)
        assert here.keys() == there.keys()
        assert any(not isinstance(dataset, str) for dataset in here.values())
        for key, dataset in here.items():
            other = there[key]
            if isinstance(dataset, str) or isinstance(other, str):
                assert dataset == other
            else:
                assert_same(dataset, other)


def test_an_atlas_in_a_bucket_loads_and_hides_its_credentials(
    homeobox_fixtures: Path, bucket: Bucket
) -> None:
    local = homeobox_fixtures / "single_rna" / "atlas"
    upload(local, f"{bucket.url}/atlas", bucket.options)
    atlas = RaggedAtlas.checkout_latest(f"{bucket.url}/atlas", storage_options=bucket.options)
    there = atlas.query().to_cell_dataset()
    here = RaggedAtlas.checkout_latest(local).query().to_cell_dataset()
    assert here.identity() == there.identity()
    loader = make_loader(there, batch_size=64, layout="dense", shuffle=True, seed=1)
    expected = make_loader(here, batch_size=64, layout="dense", shuffle=True, seed=1)
    for got, wanted in zip(loader, expected, strict=True):
        assert (got["X"] == wanted["X"]).all()
    stats = loader.stats()
    assert stats.requests > 0
    assert 0 < stats.bytes_wanted <= stats.bytes_moved
    secret = bucket.options["secret_access_key"]
    assert secret.encode() not in pickle.dumps(there)
    assert secret not in repr((atlas, there, loader, loader.state_dict(), stats))


def test_an_object_that_is_replaced_is_an_error(
    homeobox_fixtures: Path, range_server: Callable[..., RangeServer], tmp_path: Path
) -> None:
    root = tmp_path / "served" / "atlas"
    shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", root)
    server = range_server()
    dataset = (
        RaggedAtlas.checkout_latest("s3://atlas", storage_options=server.s3_options).query().to_cell_dataset()
    )
    dataset.__getitems__(np.arange(4))
    for path in (root / "zarr_store").rglob("c/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptChunkError, match="open the dataset again"):
        dataset.__getitems__(np.arange(len(dataset)))


def test_an_atlas_on_a_plain_server_is_refused_in_words(range_server: Callable[..., RangeServer]) -> None:
    server = range_server()
    with pytest.raises(UnsupportedError, match="cannot list"):
        RaggedAtlas.checkout_latest(
            f"http://127.0.0.1:{server.port}/atlas", storage_options={"allow_http": "true"}
        )


def test_no_atlas_is_found_where_there_is_none(range_server: Callable[..., RangeServer]) -> None:
    server = range_server()
    (server.root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No atlas found at s3://empty/x"):
        RaggedAtlas.checkout_latest("s3://empty/x", storage_options=server.s3_options)


def test_the_second_epoch_comes_from_the_cache(
    homeobox_fixtures: Path, range_server: Callable[..., RangeServer], tmp_path: Path
) -> None:
    shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", tmp_path / "served" / "atlas")
    server = range_server()
    dataset = (
        RaggedAtlas.checkout_latest("s3://atlas", storage_options=server.s3_options, cache=tmp_path / "cache")
        .query()
        .to_cell_dataset()
    )
    loader = make_loader(dataset, batch_size=32, layout="csr", shuffle=True, seed=1)
    rows = [batch["index"] for batch in loader]
    first = loader.stats()
    assert first.requests > 0
    dataset.close()
    asked = len(server.log)
    again = [batch["index"] for batch in loader]
    second = loader.stats()
    assert (second.requests, second.bytes_moved) == (0, 0)
    assert second.cache_hits > 0
    assert len(server.log) == asked
    assert sum(map(len, rows)) == sum(map(len, again)) == len(dataset)
    here = RaggedAtlas.checkout_latest(homeobox_fixtures / "single_rna" / "atlas").query().to_cell_dataset()
    assert_same(here, dataset)


@pytest.mark.parametrize("kinds", [PASSING, KINDS])
def test_batches_are_right_or_an_error_on_a_bad_network(
    range_server: Callable[..., RangeServer], tmp_path: Path, kinds: tuple[Kind, ...]
) -> None:
    # Chunks of our own writer have checksums, without which a changed byte could not be noticed.
    write_h5ad(tmp_path / "cells.h5ad", 300, 200)
    server = range_server(stall=0.2)
    path = tmp_path / "served" / "faults"
    assert main(["ingest", str(tmp_path / "cells.h5ad"), "--atlas", str(path)]) == 0
    here = content(RaggedAtlas.checkout_latest(path).query().to_cell_dataset())
    atlas = RaggedAtlas.checkout_latest("s3://faults", storage_options=server.s3_options)
    right = 0
    for seed in range(8):
        server.faults = None
        dataset = atlas.query().to_cell_dataset()
        server.faults = at_random(0.2, kinds, seed=seed)
        there = content(dataset)
        if isinstance(there, str) or isinstance(here, str):
            assert kinds != PASSING
            continue
        right += 1
        for a, b in zip(here, there, strict=True):
            assert np.array_equal(a, b)
    assert right
    assert any(request.fault for request in server.log)
