"""The example of Homeobox's data loading page from end to end, with the package's name changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from hbx_gpu.atlas import (
    DatasetRecord,
    FeatureBaseSchema,
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    add_from_anndata,
    create_or_open_atlas,
)
from hbx_gpu.dataloader import make_loader, sparse_to_dense_collate
from hbx_gpu.sampler import CellSampler


class GeneFeature(FeatureBaseSchema):
    gene_symbol: str


class CellSchema(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    cell_type: str | None = None
    split: str | None = None


class MyModel(torch.nn.Module):
    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(n_features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x).square().mean()
        return result


N_CELLS, GENES = 300, [f"ENSG{i:05d}" for i in range(30)]


@pytest.fixture(scope="module")
def atlas_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "db"
    atlas = create_or_open_atlas(
        path,
        obs_schemas={"cells": CellSchema},
        dataset_table_name="datasets",
        registry_schemas={"gene_expression": GeneFeature},
    )
    atlas.register_features("gene_expression", [GeneFeature(uid=g, gene_symbol=g.lower()) for g in GENES])
    rng = np.random.default_rng(0)
    for name, genes in (("one", GENES[:20]), ("two", GENES[10:])):
        adata = anndata.AnnData(
            sp.csr_matrix(rng.poisson(0.7, size=(N_CELLS // 2, len(genes))).astype(np.float32)),
            obs=pd.DataFrame(
                {
                    "cell_type": rng.choice(["B", "T", "NK"], N_CELLS // 2),
                    "split": rng.choice(["train", "test"], N_CELLS // 2),
                },
                index=[f"{name}-{i}" for i in range(N_CELLS // 2)],
            ),
            var=pd.DataFrame({"global_feature_uid": genes}, index=genes),
        )
        record = DatasetRecord(zarr_group=name, feature_space="gene_expression", n_cells=adata.n_obs)  # type: ignore[call-arg]
        add_from_anndata(
            atlas, adata, field_name="gene_expression", zarr_layer="counts", dataset_record=record
        )
    atlas.optimize()
    atlas.snapshot()
    return path


@pytest.mark.parametrize("selector", ["feature_space", "field_name"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_end_to_end(atlas_path: Path, selector: str, num_workers: int) -> None:
    store = atlas_path / "zarr_store"
    atlas_r = RaggedAtlas.checkout_latest(str(atlas_path), CellSchema, store)

    named: dict[str, Any] = {selector: "gene_expression"}  # the page has used both names
    query = atlas_r.query().where("split = 'train'")
    dataset: Any = query.to_cell_dataset(layer="counts", metadata_columns=["cell_type"], **named)
    assert dataset.n_features == len(GENES)
    sampler = CellSampler(
        groups_np=dataset.groups_np,
        batch_size=64,
        shuffle=True,
        seed=0,
        num_workers=num_workers,
    )
    loader = make_loader(dataset, sampler, collate_fn=sparse_to_dense_collate)
    model = MyModel(n_features=dataset.n_features)
    optimizer = torch.optim.Adam(model.parameters())

    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen = 0
        for batch in loader:
            assert batch["cell_type"].dtype == torch.int64
            seen += len(batch["X"])
            loss = model(batch["X"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert seen == dataset.n_cells
    loader.close()


def test_panel_of_the_page(atlas_path: Path) -> None:
    panel = [GENES[25], GENES[3], GENES[15]]
    dataset = (
        RaggedAtlas.checkout_latest(atlas_path)
        .query()
        .features(panel, feature_space="gene_expression")
        .to_cell_dataset(field_name="gene_expression", layer="counts")
    )
    assert dataset.n_features == 3
    assert dataset.feature_uids.tolist() == panel


def test_every_import_of_its_reference() -> None:
    from hbx_gpu.dataloader import (  # noqa: F401
        CellDataset,
        DenseBatch,
        MultimodalBatch,
        MultimodalCellDataset,
        SparseBatch,
        make_loader,
        multimodal_to_dense_collate,
        sparse_to_csr_collate,
        sparse_to_dense_collate,
    )
    from hbx_gpu.sampler import CellSampler  # noqa: F401
