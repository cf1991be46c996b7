"""Objects that are no cells, given where an AnnData or a path is expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from hbx_gpu import add_from_anndata, add_multimodal, create_or_open_atlas, ingest_many

NOT_DATA = {
    "csr_matrix": sparse.csr_matrix(np.eye(3)),
    "DataFrame": pd.DataFrame(np.eye(3)),
    "NoneType": None,
    "ndarray": np.eye(3),
}


@pytest.mark.parametrize("kind", NOT_DATA)
def test_what_is_not_an_anndata_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "atlas")
    for add in (
        lambda given: add_from_anndata(atlas, given),
        lambda given: add_multimodal(atlas, {"rna": given}),
    ):
        with pytest.raises(TypeError, match=f"expected an AnnData or the path of a file, got a {kind}"):
            add(NOT_DATA[kind])
    assert atlas.list_datasets().empty


def test_many_sources_are_paths(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "atlas")
    with pytest.raises(TypeError, match=r"sources must be paths.* got a AnnData.* add_from_anndata"):
        ingest_many(atlas, [AnnData(np.eye(3))])
