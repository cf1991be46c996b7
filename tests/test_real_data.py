"""Both real files into one atlas by the command line; every count comes back, whichever way it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main
from hbx_gpu.dataloader import CellDataset, make_loader, sparse_to_dense_collate
from hbx_gpu.sampler import CellSampler


@pytest.fixture(scope="module", params=["hbx_gpu.rowpack", "homeobox.bitpacking"])
def atlas(
    request: pytest.FixtureRequest, real_h5ad: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> RaggedAtlas:
    path = tmp_path_factory.mktemp("real") / "atlas"
    files = [str(f) for f in real_h5ad]
    assert main(["ingest", *files, "--atlas", str(path), "--codec", request.param]) == 0
    return RaggedAtlas.checkout_latest(path)


@pytest.fixture(scope="module")
def truth(real_h5ad: tuple[Path, Path]) -> dict[str, dict[str, dict[str, int]]]:
    """File name -> cell name -> gene id -> count, straight from the files; zeros left out."""
    result = {}
    for path, id_column in zip(real_h5ad, ("gene_ids", None), strict=True):
        data = anndata.read_h5ad(path)
        genes = np.asarray(data.var[id_column] if id_column else data.var_names, dtype=object)
        matrix = sp.csr_matrix(data.X)
        cells = {}
        for i, name in enumerate(data.obs_names):
            part = slice(matrix.indptr[i], matrix.indptr[i + 1])
            cells[name] = dict(zip(genes[matrix.indices[part]], matrix.data[part].astype(int), strict=True))
        result[path.name] = cells
    return result


Row = tuple[str, str, np.ndarray]


def by_anndata(atlas: RaggedAtlas) -> Iterator[Row]:
    data = atlas.query().to_anndata()
    names = names_of_datasets(atlas)
    assert data.X.dtype == np.uint32
    for i in range(data.n_obs):
        obs = data.obs.iloc[i]
        yield names[obs["dataset_uid"]], obs["obs_name"], data.X[i].toarray().ravel()


def from_batches(dataset: CellDataset, batches: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for batch in batches:
        for x, cell, origin in zip(batch["X"].numpy(), batch["obs_name"], batch["dataset_uid"], strict=True):
            yield (
                dataset.categories["dataset_uid"][origin],
                dataset.categories["obs_name"][cell],
                x,
            )


def by_map(dataset: CellDataset) -> Iterator[Row]:
    order = np.random.default_rng(0).permutation(len(dataset))
    yield from from_batches(
        dataset, (sparse_to_dense_collate(dataset[rows]) for rows in np.array_split(order, 20))
    )


def by_loader(num_workers: int, locality: str) -> Callable[[CellDataset], Iterator[Row]]:
    def read(dataset: CellDataset) -> Iterator[Row]:
        sampler = CellSampler(
            dataset.groups_np, batch_size=500, seed=1, num_workers=num_workers, locality=locality
        )
        with make_loader(dataset, sampler, sparse_to_dense_collate) as loader:
            yield from from_batches(dataset, iter(loader))

    return read


def names_of_datasets(atlas: RaggedAtlas) -> dict[str, str]:
    datasets = atlas.list_datasets()
    return dict(zip(datasets["dataset_uid"], datasets["source_name"], strict=True))


@pytest.mark.parametrize(
    "way",
    [
        "anndata",
        by_map,
        by_loader(0, "none"),
        by_loader(0, "block"),
        by_loader(2, "group"),
    ],
    ids=["to_anndata", "map style", "in process", "in process, blocks", "workers"],
)
def test_every_count_comes_back(
    atlas: RaggedAtlas, truth: dict[str, dict[str, dict[str, int]]], way: object
) -> None:
    if way == "anndata":
        genes = atlas.query().to_anndata().var_names.to_numpy()
        rows = by_anndata(atlas)
    else:
        dataset = atlas.query().to_cell_dataset(
            "gene_expression", metadata_columns=["obs_name", "dataset_uid"]
        )
        genes = dataset.feature_uids
        names = names_of_datasets(atlas)
        rows = ((names[uid], cell, x) for uid, cell, x in way(dataset))  # type: ignore[operator]
    seen = 0
    for file, cell, x in rows:
        filled = np.flatnonzero(x)
        expected = {gene: count for gene, count in truth[file][cell].items() if count}
        assert dict(zip(genes[filled], x[filled].astype(int), strict=True)) == expected
        seen += 1
    assert seen == sum(map(len, truth.values())) == 11_107
