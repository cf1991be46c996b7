"""A file where a folder is to be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

from hbx_gpu import create_or_open_atlas
from hbx_gpu.scdl import SingleCellCollection, SingleCellMemMapDataset


def atlas(place: Path, source: Path) -> object:
    del source
    return create_or_open_atlas(place)


def collection(place: Path, source: Path) -> object:
    del source
    return SingleCellCollection(str(place))


def archive(place: Path, source: Path) -> object:
    return SingleCellMemMapDataset(str(place / "archive"), h5ad_path=str(source), use_X_not_raw=True)


@pytest.mark.parametrize("below", ["", "deeper"])
@pytest.mark.parametrize("make", [atlas, collection, archive])
def test_a_file_in_the_way_is_named(make: Callable[[Path, Path], object], below: str, tmp_path: Path) -> None:
    source, file = tmp_path / "cells.h5ad", tmp_path / "file"
    anndata.AnnData(np.eye(3, dtype=np.float32)).write_h5ad(source)
    file.write_text("x")
    with pytest.raises(OSError, match=f"make the folder .* {file} is not a folder; choose another path"):
        make(file / below, source)
    assert file.read_text() == "x"
