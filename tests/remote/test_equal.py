"""Real files, as they lie and as atlases: what comes from object storage equals what comes from a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hbx_gpu
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._inplace.cells import Cells
from hbx_gpu.atlas import RaggedAtlas
from tests.remote.range_server import RangeServer
from tests.remote.test_writing import fill

FILES = ["human_1k_cells_x_507_genes.h5ad", "mouse_10k_cells_x_1k_genes.h5ad"]
ROWS = 300


def assert_same_rows(here: object, there: object) -> None:
    """Some rows in random order are bit for bit the same, and so are the features."""
    assert isinstance(here, CellDataset)
    assert isinstance(there, CellDataset)
    assert len(here) == len(there) > ROWS
    assert list(here.feature_uids) == list(there.feature_uids)
    rows = np.random.default_rng(0).choice(len(here), ROWS, replace=False)
    a, b = here.__getitems__(rows), there.__getitems__(rows)
    for name in ("offsets", "indices", "values"):
        mine, other = getattr(a, name), getattr(b, name)
        assert mine.dtype == other.dtype
        assert mine.tobytes() == other.tobytes(), name
    assert len(a.values) > ROWS
    assert all(path.startswith("s3://") for path in there.directory.paths)
    assert there.directory.paths


@pytest.mark.filterwarnings("ignore:.*features that share their name:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_is_the_same(shared: Path, name: str) -> None:
    with RangeServer(shared) as server:
        here = hbx_gpu.open(shared / "data" / name)
        there = hbx_gpu.open(f"s3://data/{name}", storage_options=server.s3_options)
        assert isinstance(here, Cells)
        assert isinstance(there, Cells)
        assert_same_rows(here.to_cell_dataset(), there.to_cell_dataset())
        pd.testing.assert_frame_equal(here.to_pandas(), there.to_pandas())


@pytest.mark.parametrize("name", FILES)
def test_an_atlas_of_a_real_file_is_the_same(shared: Path, tmp_path: Path, name: str) -> None:
    fill(tmp_path / "b" / "atlas", shared / "data" / name)
    with RangeServer(tmp_path) as server:
        here = RaggedAtlas.checkout_latest(tmp_path / "b" / "atlas").query()
        there = RaggedAtlas.checkout_latest("s3://b/atlas", storage_options=server.s3_options).query()
        assert_same_rows(here.to_cell_dataset(), there.to_cell_dataset())
        pd.testing.assert_frame_equal(here.to_pandas(), there.to_pandas())
