"""The multimodal snippets of Homeobox's data loading page, with the package's name changed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from hbx_gpu.atlas import (
    DenseZarrPointer,
    FeatureBaseSchema,
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    add_from_anndata,
    add_multimodal,
    create_or_open_atlas,
)
from hbx_gpu.dataloader import (
    MultimodalBatch,
    MultimodalCellDataset,
    make_loader,
    multimodal_to_dense_collate,
)
from hbx_gpu.errors import UnknownNameError
from hbx_gpu.sampler import CellSampler

RNA, PROTEIN = "gene_expression", "protein_abundance"
GENES = [f"ENSG{i:05d}" for i in range(30)]
PROTEINS = [f"P{i:05d}" for i in range(6)]
# Cells of CITE-seq have both, those of a 10x 3' experiment RNA only, and some cells only proteins.
CITE, GEX, ADT = 60, 50, 20
N_CELLS = CITE + GEX + ADT


class GeneFeature(FeatureBaseSchema):
    gene_symbol: str


class ProteinFeature(FeatureBaseSchema):
    antibody: str


class CellSchema(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space=RNA)
    protein_abundance: DenseZarrPointer | None = PointerField.declare(feature_space=PROTEIN)
    cell_type: str | None = None
    name: str | None = None


def make(counts: Any, features: list[str], cells: list[str], seed: int) -> anndata.AnnData:
    types = np.random.default_rng(seed).choice(["B", "T", "NK"], len(cells))
    return anndata.AnnData(
        counts,
        obs=pd.DataFrame({"cell_type": types, "name": cells}, index=cells),
        var=pd.DataFrame({"global_feature_uid": features}, index=features),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pd.DataFrame]]:
    """An atlas, and what each modality of it holds: cells that have it x features, by name."""
    path = tmp_path_factory.mktemp("page") / "db"
    atlas = create_or_open_atlas(
        path,
        obs_schemas={"cells": CellSchema},
        dataset_table_name="datasets",
        registry_schemas={RNA: GeneFeature, PROTEIN: ProteinFeature},
    )
    atlas.register_features(RNA, [GeneFeature(uid=g, gene_symbol=g.lower()) for g in GENES])
    atlas.register_features(PROTEIN, [ProteinFeature(uid=p, antibody=p.lower()) for p in PROTEINS])
    rng = np.random.default_rng(0)

    def rna(cells: list[str], genes: list[str]) -> anndata.AnnData:
        counts = rng.poisson(0.8, (len(cells), len(genes))).astype(np.float32)
        return make(sp.csr_matrix(counts), genes, cells, len(cells))

    def protein(cells: list[str], proteins: list[str]) -> anndata.AnnData:
        return make(
            rng.poisson(30, (len(cells), len(proteins))).astype(np.float32), proteins, cells, len(cells)
        )

    cite = [f"cite-{i}" for i in range(CITE)]
    parts = {
        RNA: [rna(cite, GENES[:25]), rna([f"gex-{i}" for i in range(GEX)], GENES[5:])],
        PROTEIN: [protein(cite, PROTEINS[:4]), protein([f"adt-{i}" for i in range(ADT)], PROTEINS[2:])],
    }
    add_multimodal(
        atlas, {RNA: parts[RNA][0], PROTEIN: parts[PROTEIN][0]}, feature_id_column="global_feature_uid"
    )
    add_from_anndata(atlas, parts[RNA][1], field_name=RNA, zarr_layer="counts")
    add_from_anndata(atlas, parts[PROTEIN][1], field_name=PROTEIN, zarr_layer="counts")
    atlas.optimize()
    atlas.snapshot()
    whole = {
        space: pd.concat([a.to_df() for a in adatas]).fillna(0)[GENES if space == RNA else PROTEINS]
        for space, adatas in parts.items()
    }
    return path, whole


def checked_out(path: Path) -> Any:
    return RaggedAtlas.checkout_latest(str(path), CellSchema, path / "zarr_store")


@pytest.fixture
def dataset(page: tuple[Path, dict[str, pd.DataFrame]]) -> MultimodalCellDataset:
    result: MultimodalCellDataset = (
        checked_out(page[0])
        .query()
        .to_multimodal_dataset(
            feature_spaces=[RNA, PROTEIN],
            layers={RNA: "counts", PROTEIN: "counts"},
            metadata_columns=["cell_type", "name"],
        )
    )
    return result


def names_of(dataset: MultimodalCellDataset, batch: MultimodalBatch) -> list[str]:
    assert batch.metadata is not None
    result: list[str] = dataset.categories["name"][batch.metadata["name"]].tolist()
    return result


def test_the_dataset(dataset: MultimodalCellDataset) -> None:
    assert dataset.n_cells == N_CELLS
    assert dataset.n_features == {RNA: len(GENES), PROTEIN: len(PROTEINS)}
    assert dataset.groups_np.shape == (N_CELLS,)
    assert dataset.groups_np.dtype == np.int32
    assert np.bincount(dataset.groups_np).tolist() in ([CITE, GEX, ADT], [GEX, CITE, ADT])


@pytest.mark.parametrize("selector", ["feature_spaces", "field_names"])
def test_the_batch(page: tuple[Path, dict[str, pd.DataFrame]], selector: str) -> None:
    path, whole = page
    dataset = (
        checked_out(path)
        .query()
        .to_multimodal_dataset(
            **{selector: [RNA, PROTEIN]},  # the page has used both names
            layers={RNA: "counts", PROTEIN: "counts"},
            metadata_columns=["name"],
        )
    )
    rows = np.random.default_rng(1).permutation(N_CELLS)
    batch = dataset.__getitems__(rows.tolist())
    assert isinstance(batch, MultimodalBatch)
    assert batch.n_cells == N_CELLS
    assert set(batch.modalities) == set(batch.present) == {RNA, PROTEIN}
    cells = names_of(dataset, batch)
    assert len(set(cells)) == N_CELLS
    tensors = multimodal_to_dense_collate(batch)
    for space, columns in ((RNA, GENES), (PROTEIN, PROTEINS)):
        assert len(batch.modalities[space]) == N_CELLS
        present = batch.present[space]
        assert present.shape == (N_CELLS,)
        assert present.dtype == bool
        assert present.tolist() == [name in whole[space].index for name in cells]
        # "the row will be zeros", and everywhere else what was ingested
        expected = whole[space].reindex(cells).fillna(0)
        found = pd.DataFrame(tensors[space]["X"].numpy(), index=cells, columns=dataset.feature_uids[space])
        assert set(found.columns) == set(columns)
        assert np.array_equal(found[expected.columns].to_numpy(), expected.to_numpy())


def test_without_metadata(page: tuple[Path, dict[str, pd.DataFrame]]) -> None:
    dataset = checked_out(page[0]).query().to_multimodal_dataset([RNA, PROTEIN])
    batch = dataset.__getitems__([0, 1])
    assert batch.metadata is None
    assert "metadata" not in multimodal_to_dense_collate(batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader(
    page: tuple[Path, dict[str, pd.DataFrame]], dataset: MultimodalCellDataset, num_workers: int
) -> None:
    sampler = CellSampler(
        groups_np=dataset.groups_np,
        batch_size=32,
        shuffle=True,
        seed=42,
        num_workers=num_workers,
    )
    loader = make_loader(dataset, sampler, collate_fn=multimodal_to_dense_collate)
    assert loader.num_workers == num_workers
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen: list[str] = []
        for batch in loader:
            rna = batch[RNA]["X"]
            protein = batch[PROTEIN]["X"]
            rna_present = batch["present"][RNA]
            cell_type = batch["metadata"]["cell_type"]
            n = len(rna)
            assert rna.shape == (n, len(GENES))
            assert rna.dtype == torch.float32
            assert protein.shape == (n, len(PROTEINS))
            assert rna_present.dtype == torch.bool
            assert rna_present.shape == (n,)
            assert cell_type.dtype == torch.int64
            assert not rna[~rna_present].any()
            cells = dataset.categories["name"][batch["metadata"]["name"].numpy()].tolist()
            for space in (RNA, PROTEIN):
                expected = page[1][space].reindex(cells).fillna(0)[dataset.feature_uids[space]]
                assert np.array_equal(batch[space]["X"].numpy(), expected.to_numpy())
            seen += cells
        assert len(seen) == len(set(seen)) == N_CELLS
        epochs.append(seen)
    loader.close()
    assert epochs[0] != epochs[1]


def test_a_gene_that_was_not_measured_is_no_zero(dataset: MultimodalCellDataset) -> None:
    batch = dataset.__getitems__(np.arange(N_CELLS))
    cells = names_of(dataset, batch)
    tensors = multimodal_to_dense_collate(batch)
    had = {
        RNA: {"cite": GENES[:25], "gex": GENES[5:], "adt": []},
        PROTEIN: {"cite": PROTEINS[:4], "gex": [], "adt": PROTEINS[2:]},
    }
    for space, by_dataset in had.items():
        measured = tensors["measured"][space]
        assert measured.dtype == torch.bool
        assert measured.shape == (N_CELLS, dataset.n_features[space])
        uids = dataset.feature_uids[space].tolist()
        for name, row in zip(cells, measured.numpy(), strict=True):
            assert row.tolist() == [uid in by_dataset[name.split("-")[0]] for uid in uids]
        assert np.array_equal(batch.measured[space], measured.numpy())
        assert not tensors[space]["X"][~measured].any()


def test_a_panel_of_one_modality(page: tuple[Path, dict[str, pd.DataFrame]]) -> None:
    path, whole = page
    panel = [PROTEINS[5], PROTEINS[0], PROTEINS[3]]
    dataset = (
        checked_out(path)
        .query()
        .features(panel, feature_space=PROTEIN)
        .to_multimodal_dataset([RNA, PROTEIN], metadata_columns=["name"])
    )
    assert dataset.n_features == {RNA: len(GENES), PROTEIN: 3}
    assert dataset.feature_uids[PROTEIN].tolist() == panel
    batch = dataset.__getitems__(np.arange(N_CELLS))
    expected = whole[PROTEIN].reindex(names_of(dataset, batch)).fillna(0)[panel].to_numpy()
    found = multimodal_to_dense_collate(batch)[PROTEIN]["X"].numpy()
    assert np.array_equal(found, expected)


def test_the_layer_name_of_the_page_does_not_exist(page: tuple[Path, dict[str, pd.DataFrame]]) -> None:
    # The page says "raw"; proteins have counts, and Homeobox itself raises KeyError.
    query = checked_out(page[0]).query()
    with pytest.raises(KeyError, match="counts") as error:
        query.to_multimodal_dataset([RNA, PROTEIN], layers={RNA: "counts", PROTEIN: "raw"})[[0]]
    assert isinstance(error.value, UnknownNameError)
    assert "raw" in str(error.value)


def test_pickled_as_the_page_promises(dataset: MultimodalCellDataset) -> None:
    rows = [5, N_CELLS - 1, 0]
    before = multimodal_to_dense_collate(dataset.__getitems__(rows))
    again = pickle.loads(pickle.dumps(dataset))
    after = multimodal_to_dense_collate(again.__getitems__(rows))
    for space in (RNA, PROTEIN):
        assert torch.equal(before[space]["X"], after[space]["X"])
        assert torch.equal(before["present"][space], after["present"][space])
    assert torch.equal(before["metadata"]["cell_type"], after["metadata"]["cell_type"])


class MyModel(torch.nn.Module):
    def __init__(self, n_features: dict[str, int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(n, 1) for name, n in n_features.items()})

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        losses = [
            (layer(torch.log1p(batch[name]["X"])).square()[batch["present"][name]]).sum()
            for name, layer in self.layers.items()
        ]
        return torch.stack(losses).sum()


def test_a_training_loop(page: tuple[Path, dict[str, pd.DataFrame]]) -> None:
    dataset = (
        checked_out(page[0]).query().to_multimodal_dataset([RNA, PROTEIN], metadata_columns=["cell_type"])
    )
    sampler = CellSampler(dataset.groups_np, batch_size=16, seed=0, num_workers=0)
    loader = make_loader(dataset, sampler, collate_fn=multimodal_to_dense_collate)
    model = MyModel(dataset.n_features)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    losses = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            assert batch[PROTEIN]["X"].dtype == torch.float32  # the page's dtype of every modality
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        losses.append(total)
    loader.close()
    assert losses[-1] < losses[0]


def test_every_import_of_the_snippets() -> None:
    import hbx_gpu

    for name in ("MultimodalCellDataset", "MultimodalBatch", "multimodal_to_dense_collate", "make_loader"):
        assert getattr(hbx_gpu, name) is getattr(hbx_gpu.dataloader, name)
    assert hbx_gpu.CellSampler is CellSampler
