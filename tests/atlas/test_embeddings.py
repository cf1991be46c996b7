"""Results of a model as a modality of an atlas: the right row for each cell, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._ingest import embeddings
from hbx_gpu.dataloader import make_loader
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError
from hbx_gpu.inference import RowWriter
from hbx_gpu.sampler import CellSampler


def make_atlas(root: Path, sizes: tuple[int, ...] = (30, 20)) -> RaggedAtlas:
    atlas = create_or_open_atlas(root)
    rng = np.random.default_rng(0)
    for k, n in enumerate(sizes):
        obs = pd.DataFrame(
            {"type": rng.choice(["B", "T"], n), "depth": np.arange(n)}, index=[f"s{k}c{i}" for i in range(n)]
        )
        x = sp.csr_matrix(rng.integers(0, 4, (n, 12)).astype(np.float32))
        var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(12)])
        anndata.AnnData(x, obs=obs, var=var).write_h5ad(root.parent / f"{k}.h5ad")
        atlas.add_from_h5ad(root.parent / f"{k}.h5ad")
    atlas.optimize()
    atlas.snapshot()
    return atlas


@pytest.fixture
def atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RaggedAtlas:
    monkeypatch.setattr(embeddings, "_BLOCK", 64)  # several blocks
    monkeypatch.setattr(embeddings, "_ROWS", 7)
    return make_atlas(tmp_path / "atlas")


def uids(atlas: RaggedAtlas) -> list[str]:
    found: list[str] = RaggedAtlas.checkout_latest(atlas.path).query().to_arrow()["uid"].to_pylist()
    return found


def state(atlas: RaggedAtlas) -> tuple[Any, ...]:
    groups = sorted(str(p.relative_to(atlas.path)) for p in (atlas.path / "zarr_store").glob("*/*"))
    notes = sorted(p.name for p in (atlas.path / ".hbx_gpu").glob("*.json"))
    return atlas.catalog.obs("cells").to_arrow().to_pylist(), len(atlas.list_datasets()), groups, notes


def test_results_for_the_cells_of_a_query_come_back_with_their_cells(atlas: RaggedAtlas) -> None:
    """Written in shuffled batches through a query, read back as a modality beside the genes."""
    before = RaggedAtlas.checkout_latest(atlas.path)
    query = before.query().where("type = 'B'")
    dataset = query.to_cell_dataset("gene_expression")
    cells = query.to_modality_obs("gene_expression")["uid"].to_pylist()
    loader = make_loader(dataset, CellSampler(dataset.groups_np, 8, seed=3), layout="dense", threads=1)
    with RowWriter(atlas.path, len(dataset), 12, key="X_model", cells=cells) as writer:
        for batch in loader:
            writer.write(batch["X"] * 2, batch["index"])

    after = RaggedAtlas.checkout_latest(atlas.path)
    assert (before.version, after.version) == (0, 1)
    assert after.query().to_arrow()["uid"].to_pylist() == before.query().to_arrow()["uid"].to_pylist()
    assert "X_model" not in before.pointer_fields
    assert after.query().to_modality_obs("X_model")["uid"].to_pylist() == cells
    expected = before.query().where("type = 'B'").to_anndata().X.toarray() * 2
    assert np.array_equal(after.query().to_array("X_model"), expected)
    assert atlas.validate() == []

    both = after.query().to_multimodal_dataset(["gene_expression", "X_model"])
    found = next(iter(make_loader(both, batch_size=50, shuffle=False, layout="dense", threads=1)))
    there = found["present"]["X_model"]
    assert int(there.sum()) == len(cells) < 50
    assert torch.equal(found["X_model"]["X"][there], 2 * found["gene_expression"]["X"][there])
    assert not [p.name for p in atlas.path.parent.iterdir() if p.name.startswith(".")]


def test_replaced_for_other_cells(atlas: RaggedAtlas) -> None:
    names = uids(atlas)
    values = np.arange(100, dtype=np.float16).reshape(50, 2)
    assert atlas.add_embedding("emb", values, names) == 50
    first = atlas.snapshot()
    with pytest.raises(AlreadyIngestedError, match="overwrite"):
        atlas.add_embedding("emb", values, names)
    some = names[3:20:4]
    atlas.add_embedding("emb", np.ones((len(some), 3), np.float32), some, overwrite=True)
    assert atlas.validate() == []
    atlas.snapshot()
    newest = RaggedAtlas.checkout_latest(atlas.path).query()
    assert newest.to_modality_obs("emb")["uid"].to_pylist() == some
    assert newest.to_array("emb")[0].shape == (3,)
    assert np.array_equal(RaggedAtlas.checkout(atlas.path, first).query().to_array("emb"), values)
    assert uids(atlas) == names
    # They belong to their datasets: with a dataset its results go.
    atlas.remove_dataset("0.h5ad")
    assert atlas.validate() == []
    assert set(atlas.list_datasets()["feature_space"]) == {"gene_expression"}


@pytest.mark.parametrize(
    ("error", "told", "change"),
    [
        (InvalidDataError, "1 cells are not in the obs table", {"cells": ["x"]}),
        (InvalidDataError, "a cell comes more than once", {"cells": "twice"}),
        (InvalidDataError, "1 rows of values and 2 cells", {"cells": ["a", "b"]}),
        (InvalidDataError, "got float64 of shape", {"values": np.zeros((1, 2))}),
        (AtlasError, "has a column 'type' which is", {"name": "type"}),
        (AtlasError, "free of dots", {"name": "a.b"}),
    ],
)
def test_what_does_not_fit_changes_nothing(
    atlas: RaggedAtlas, error: type[Exception], told: str, change: dict[str, Any]
) -> None:
    before = state(atlas)
    names = uids(atlas)
    given: dict[str, Any] = {
        "name": "emb",
        "values": np.zeros((1, 2), np.float32),
        "cells": names[:1],
    } | change
    if given["cells"] == "twice":
        given |= {"cells": names[:1] * 2, "values": np.zeros((2, 2), np.float32)}
    with pytest.raises(error, match=told):
        atlas.add_embedding(given.pop("name"), **given)
    assert state(atlas) == before


@pytest.mark.parametrize("name", ["_write", "_point"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_writer_that_fails_or_is_killed(
    atlas: RaggedAtlas, monkeypatch: pytest.MonkeyPatch, name: str, killed: bool
) -> None:
    before, names = state(atlas), uids(atlas)
    values = np.ones((50, 2), np.float32)
    real = getattr(embeddings, name)

    def failing(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, name, failing)
        if killed:  # nothing is undone by the process itself
            patch.setattr(Catalog, "undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            atlas.add_embedding("emb", values, names)
    with atlas.session.writing():
        pass  # the next writer
    if name == "_point":  # the commit was reached, so the results are there
        assert state(atlas)[3] == []
        assert atlas.validate() == []
        assert atlas.catalog.obs("cells").count_rows("emb IS NOT NULL") == 50
    else:
        assert state(atlas) == before
    atlas.add_embedding("emb", values, names, overwrite=True)
    atlas.snapshot()
    assert RaggedAtlas.checkout_latest(atlas.path).query().to_array("emb")[49].shape == (2,)


def test_targets_that_do_not_fit(atlas: RaggedAtlas) -> None:
    names = uids(atlas)
    for options, told in (
        ({"cells": names}, "needs key="),
        ({"key": "emb"}, "needs cells=, the uid of the cell of each of 50 rows, got None"),
        ({"key": "emb", "cells": names[1:]}, "each of 50 rows, got 49"),
        ({"key": "emb", "cells": [*names[1:], "x"]}, "not in the latest snapshot"),
        ({"key": "emb", "cells": names, "dtype": "int32"}, "float32 or float16, got int32"),
    ):
        with pytest.raises(ValueError, match=told):
            RowWriter(atlas.path, 50, 2, **options)
    atlas.add_embedding("emb", np.ones((50, 2), np.float32), names)
    atlas.snapshot()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        RowWriter(atlas.path, 50, 2, key="emb", cells=names)
    RowWriter(atlas.path, 50, 2, key="emb", cells=names, overwrite=True)
