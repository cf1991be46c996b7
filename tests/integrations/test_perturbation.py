"""Sets of perturbed cells with matched controls, in the form of cell-load."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

import hbx_gpu
from hbx_gpu.integrations.perturbation import perturbation_loader
from hbx_gpu.transforms import log1p

N, GENES, S = 600, 12, 16
TYPES, GUIDES, PLATES = ["A", "B"], ["ctrl", "g1", "g2", "g3"], ["p1", "p2", "p3"]
OBS = pd.DataFrame(
    {
        "cell_type": np.random.default_rng(0).choice(TYPES, N),
        "guide": np.random.default_rng(1).choice(GUIDES, N, p=[0.4, 0.35, 0.23, 0.02]),
        "plate": np.random.default_rng(2).choice(PLATES, N),
    },
    index=[f"cell{i}" for i in range(N)],
)
COUNTS = np.random.default_rng(3).poisson(3.0, (N, GENES)).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two files, whose rows lie in no order."""
    folder = tmp_path_factory.mktemp("cells")
    for k, part in enumerate((slice(0, 250), slice(250, N))):
        obs = OBS.iloc[part].astype("category")
        anndata.AnnData(csr_matrix(COUNTS[part]), obs=obs).write_h5ad(folder / f"{k}.h5ad")
    return hbx_gpu.open(str(folder)).to_cell_dataset(layer="X", metadata_columns=list(OBS.columns))


def loader(dataset: Any, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "perturbation": "guide", "control": "ctrl", "cell_type": "cell_type", "batch": "plate",
        "set_size": S, "sets_per_batch": 2, "seed": 1, "executor": "direct", "threads": 1,
    }  # fmt: skip
    return perturbation_loader(dataset, **(chosen | options))


def test_batches_have_the_keys_of_cell_load(dataset: Any) -> None:
    barcodes = OBS.index.to_numpy()
    seen: list[int] = []
    for batch in loader(dataset, barcodes=barcodes, transform=log1p):
        rows, controls = batch["index"].numpy(), batch["ctrl_index"].numpy()
        cells, matched = OBS.iloc[rows], OBS.iloc[controls]
        assert np.allclose(batch["pert_cell_emb"], np.log1p(COUNTS[rows]), atol=1e-6)
        assert np.allclose(batch["ctrl_cell_emb"], np.log1p(COUNTS[controls]), atol=1e-6)
        assert (matched["guide"] == "ctrl").all()
        for column in ("cell_type", "plate"):
            assert (matched[column].to_numpy() == cells[column].to_numpy()).all()
        for one in np.split(np.arange(len(rows)), len(rows) // S):
            assert len(cells.iloc[one][["cell_type", "guide"]].drop_duplicates()) == 1
        assert batch["pert_name"] == cells["guide"].tolist()
        assert batch["cell_type"] == cells["cell_type"].tolist()
        assert batch["batch_name"] == cells["plate"].tolist()
        for key, names, values in (
            ("pert_emb", GUIDES, batch["pert_name"]),
            ("cell_type_onehot", TYPES, batch["cell_type"]),
            ("batch", PLATES, batch["batch_name"]),
        ):
            assert batch[key].dtype == torch.float32
            assert [names[code] for code in batch[key].argmax(1).tolist()] == values
            assert (batch[key].sum(1) == 1).all()
        assert batch["pert_cell_barcode"] == batch["barcodes"] == barcodes[rows].tolist()
        assert batch["ctrl_cell_barcode"] == barcodes[controls].tolist()
        seen += rows.tolist()
    assert set(seen) == set(np.flatnonzero(OBS["guide"] != "ctrl").tolist())


def test_controls_of_a_cell_type_and_plate_are_drawn_alike(dataset: Any) -> None:
    drawn = np.zeros(N)
    plain = loader(dataset)
    for epoch in range(40):
        plain.set_epoch(epoch)
        for batch in plain:
            np.add.at(drawn, batch["ctrl_index"].numpy(), 1)
    for _, group in OBS[OBS["guide"] == "ctrl"].reset_index().groupby(["cell_type", "plate"]):
        mine = drawn[OBS.index.get_indexer(group["index"])]
        expected = mine.mean()
        assert ((mine - expected) ** 2 / expected).sum() < 2.5 * len(mine)


def test_small_groups_and_splits(dataset: Any) -> None:
    rare = OBS.index[OBS["guide"] == "g3"]
    names = [name for batch in loader(dataset) for name in batch["pert_name"]]
    assert 0 < len(rare) < 2 * S
    assert "g3" in names
    names = [name for batch in loader(dataset, small_groups="leave out") for name in batch["pert_name"]]
    assert set(names) == {"g1", "g2"}
    half = np.arange(N) % 2 == 0
    for batch in loader(dataset, rows=half):
        assert half[batch["index"].numpy()].all()
        assert half[batch["ctrl_index"].numpy()].all()


def test_a_run_goes_on_in_mid_epoch(dataset: Any) -> None:
    whole, state = [], None
    one = loader(dataset)
    for batch in one:
        whole.append(batch["index"].tolist() + batch["ctrl_index"].tolist())
        if len(whole) == 3:
            state = one.state_dict()
    again = loader(dataset)
    again.load_state_dict(state)
    assert [b["index"].tolist() + b["ctrl_index"].tolist() for b in again] == whole[3:]


def test_embeddings_of_perturbations(dataset: Any) -> None:
    vectors = {name: torch.full((5,), float(k)) for k, name in enumerate(GUIDES)}
    batch = next(iter(loader(dataset, embeddings=vectors, batch=None)))
    assert torch.equal(batch["pert_emb"], torch.stack([vectors[name] for name in batch["pert_name"]]))
    assert batch["batch"].shape == (2 * S, 1)
    del vectors["g2"]
    with pytest.raises(ValueError, match=r"1 perturbations have no embedding, the first are \['g2'\]"):
        loader(dataset, embeddings=vectors)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"control": "none"}, "has no value 'none', only"),
        ({"batch": "donor"}, "no categorical column 'donor'"),
        ({"small_groups": "drop"}, "must be 'repeat' or 'leave out'"),
        ({"barcodes": ["a"]}, "barcodes must have 600 entries"),
    ],
)
def test_wrong_arguments(dataset: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loader(dataset, **options)


def test_a_layout_of_its_own(dataset: Any) -> None:
    batch = next(iter(loader(dataset, layout="csr")))
    assert batch["pert_cell_emb"].layout == torch.sparse_csr
