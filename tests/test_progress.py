"""Something else where a function is expected that shows progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbx_gpu import create_or_open_atlas, ingest_many
from hbx_gpu.scdl import SingleCellCollection
from hbx_gpu.scdl._writing.convert import convert_h5ad
from hbx_gpu.statistics import compute
from hbx_gpu.synthetic import write_demo_pair
from hbx_gpu.testing import example_dataset, example_groups

WORDS = "progress must be a function"


def test_what_cannot_be_called_is_refused_before_the_work(tmp_path: Path) -> None:
    write_demo_pair(tmp_path / "data", n_obs=(20, 20), n_vars=30)
    files = sorted((tmp_path / "data").glob("*.h5ad"))
    atlas = create_or_open_atlas(tmp_path / "atlas")
    with pytest.raises(TypeError, match=WORDS):
        ingest_many(atlas, files, progress=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=WORDS):
        atlas.add_from_anndata(files[0], progress=True)
    assert atlas.list_datasets().empty
    with pytest.raises(TypeError, match=WORDS):
        convert_h5ad(files[0], tmp_path / "archive", progress=True)  # type: ignore[arg-type]
    assert not (tmp_path / "archive").exists()
    with pytest.raises(TypeError, match=WORDS):
        SingleCellCollection(str(tmp_path / "all")).load_h5ad_multi(tmp_path / "data", progress=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=WORDS):
        compute(example_dataset(tmp_path / "example", example_groups()), progress=True)  # type: ignore[arg-type]
    convert_h5ad(files[0], tmp_path / "archive", progress=None)
