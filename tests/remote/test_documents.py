"""An atlas keeps the metadata of its arrays in one object, and says so where the object is out of date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._catalog import documents
from hbx_gpu.errors import CorruptChunkError, CorruptDataError
from tests.remote.range_server import RangeServer
from tests.remote.test_atlases import assert_same
from tests.remote.test_writing import fill, h5ad

Make = Callable[..., RangeServer]


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """A local atlas of three groups."""
    path = tmp_path / "local" / "atlas"
    fill(path, *(h5ad(tmp_path / f"{seed}.h5ad", seed) for seed in range(3)))
    return path


def served(atlas: Path, server: RangeServer) -> str:
    """The address of a copy of the atlas, another one for each call: processes remember addresses."""
    name = f"copy{len(list(server.root.iterdir()))}"
    shutil.copytree(atlas, server.root / name / "atlas")
    return f"s3://{name}/atlas"


def opened(url: str, server: RangeServer) -> RaggedAtlas:
    return RaggedAtlas.checkout_latest(url, storage_options=server.s3_options)


def asked(server: RangeServer) -> list[str]:
    """The documents of arrays that were asked for."""
    return [request.path for request in server.requests("GET", "zarr_store") if "zarr.json" in request.path]


def test_packing_keeps_every_byte() -> None:
    given = {
        "a/csr/indices": b'{"zarr_format":3,"shape": [12],"x":1}',
        "b/csr/indices": b'{"zarr_format":3,"shape": [9],"x":1}',
        "c/strange": '{"shäpe": [1]}'.encode(),
        "d/grid": b'{"shape":[ 3, 4 ],"other":{"shape":[5]}}',
    }
    text = documents.packed(given)
    assert documents.unpacked(text.encode(), "here") == given
    assert len(json.loads(text)["frames"]) == 3
    assert documents.unpacked(b'{"format": 2}', "here") == {}
    for damaged in (b"[]", b"{}", b'{"format":1,"frames":[],"arrays":{"a":[0,""]}}'):
        with pytest.raises(CorruptDataError, match="remove it"):
            documents.unpacked(damaged, "here")


def test_opening_asks_for_no_document_of_an_array(atlas: Path, range_server: Make) -> None:
    server = range_server()
    there = opened(served(atlas, server), server).query().to_cell_dataset()
    assert asked(server) == []
    assert_same(RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset(), there)
    # Before an array is read, its own document is compared.
    assert len(asked(server)) == 6


def test_groups_that_are_not_listed_are_opened_all_the_same(
    atlas: Path, range_server: Make, tmp_path: Path
) -> None:
    listed = (atlas / documents.NAME).read_bytes()
    fill(atlas, h5ad(tmp_path / "more.h5ad", 7))
    (atlas / documents.NAME).write_bytes(listed)
    here = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset()
    server = range_server()
    there = opened(served(atlas, server), server).query().to_cell_dataset()
    assert len(asked(server)) == 2
    assert_same(here, there)


def test_a_damaged_file_costs_requests_only(
    atlas: Path, range_server: Make, caplog: pytest.LogCaptureFixture
) -> None:
    (atlas / documents.NAME).write_bytes(b"{")
    server = range_server()
    there = opened(served(atlas, server), server).query().to_cell_dataset()
    assert len(asked(server)) == 6
    assert documents.NAME in caplog.text
    assert_same(RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset(), there)


def test_repack_keeps_it_up_to_date(atlas: Path) -> None:
    before = documents.unpacked((atlas / documents.NAME).read_bytes(), "here")
    repack(atlas, "homeobox.bitpacking")
    after = documents.unpacked((atlas / documents.NAME).read_bytes(), "here")
    assert before.keys() == after.keys()
    assert before != after
    assert all(
        (atlas / "zarr_store" / path / "zarr.json").read_bytes() == text for path, text in after.items()
    )


def test_what_another_program_left_out_of_date_is_an_error_once(atlas: Path, range_server: Make) -> None:
    stale = (atlas / documents.NAME).read_bytes()
    repack(atlas, "homeobox.bitpacking")
    (atlas / documents.NAME).write_bytes(stale)
    server = range_server()
    url = served(atlas, server)
    first = opened(url, server).query().to_cell_dataset()
    with pytest.raises(CorruptChunkError, match="open the dataset again"):
        first.__getitems__(np.arange(len(first)))
    here = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset()
    assert_same(here, opened(url, server).query().to_cell_dataset())


def test_atlases_written_to_a_bucket_have_it(range_server: Make, tmp_path: Path) -> None:
    server = range_server()
    (server.root / "bucket").mkdir()
    url = "s3://bucket/new"
    fill(url, h5ad(tmp_path / "a.h5ad"), options=server.s3_options)
    create_or_open_atlas(url, storage_options=server.s3_options)
    server.log.clear()
    assert len(opened(url, server).query().to_cell_dataset()) == 30
    assert asked(server) == []
