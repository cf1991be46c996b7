"""Chunks in the gaps that requests read over stay in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.batch import SparseBatch
from tests.remote.range_server import RangeServer
from tests.security.stores import make_atlas, read


def test_what_lies_between_is_not_fetched_again(
    range_server: Callable[..., RangeServer], tmp_path: Path
) -> None:
    """The two ends of each group bring all of it, gaps included; a local reader sees the same rows."""
    # Caches are remembered by address, so no other test may use this one.
    root = make_atlas(tmp_path / "served" / "gaps")
    server = range_server()
    atlas = RaggedAtlas.checkout_latest(
        "s3://gaps", storage_options=server.s3_options, cache=tmp_path / "cache"
    )
    dataset = atlas.query().to_cell_dataset("gene_expression")
    dataset.__getitems__(np.array([0, 39, 40, 79]))
    asked = len(server.requests(part="zarr_store"))
    batch = dataset[np.arange(80)]
    assert len(server.requests(part="zarr_store")) == asked
    assert isinstance(batch, SparseBatch)
    for ours, theirs in zip((batch.indices, batch.values, batch.offsets), read(root), strict=True):
        assert np.array_equal(ours, theirs)
