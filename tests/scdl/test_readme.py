"""Every snippet of SCDL's README runs, with nothing but its import lines and data changed.

Where text and program disagree (`--paginated_load_cutoff`, casting a reopened archive) the text's form works.
One line cannot: a snippet unpacks two items of `get_row`, where another snippet needs the three that it has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.scdl.files import adata, counts

torch = pytest.importorskip("torch")

H5AD = "hdf5s/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the README: `hdf5s/` with a file, all paths relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hdf5s").mkdir()
    data = adata(counts(25, 34, seed=1))
    data.obs["cell_line"] = pd.Categorical([f"line{i % 3}" for i in range(25)])
    data.raw = data.copy()
    data.write_h5ad(H5AD)
    return tmp_path


def make() -> Any:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    return SingleCellMemMapDataset("97e_scmm", H5AD)


def test_loading_and_interrogating() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    data = SingleCellMemMapDataset("97e_scmm", H5AD)
    x = counts(25, 34, seed=1)
    assert data.number_of_rows() == 25
    assert data.number_of_variables() == [34]
    assert data.number_of_values() == 25 * 34
    assert data.number_nonzero_values() == x.nnz


def test_lazy_loading() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    data = SingleCellMemMapDataset("97e_scmm", H5AD, paginated_load_cutoff=0, load_block_row_size=4)
    assert data.number_of_rows() == 25


def test_x_instead_of_raw() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    data = SingleCellMemMapDataset("97e_scmm", H5AD, use_X_not_raw=True)
    assert data.number_of_rows() == 25


def test_saving_and_reloading() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    data = make()
    data.save()
    reloaded_data = SingleCellMemMapDataset("97e_scmm")
    assert reloaded_data.shape() == data.shape()


def test_tokenization() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    make()
    ds = SingleCellMemMapDataset("97e_scmm")
    index = 0
    row: Any = ds.get_row(
        index,
        return_var_features=True,
        var_feature_names=["feature_id"],
        return_obs_features=True,
        obs_feature_names=["cell_line"],
    )
    values, var_feature_ids, obs_feature_ids = row
    assert len(var_feature_ids) == 1
    assert len(obs_feature_ids) == 1
    gene_data, col_idxs = np.array(values[0]), np.array(values[1])
    tokenizer_function: Any = lambda x, y, z, w: x  # noqa: ARG005, E731
    tokens = tokenizer_function(gene_data, col_idxs, var_feature_ids[0], obs_feature_ids[0])
    assert tokens.tolist() == counts(25, 34, seed=1)[0].data.tolist()
    assert obs_feature_ids == ["line0"]
    assert var_feature_ids[0].tolist() == [f"g{i}" for i in range(34)]


def test_observed_features() -> None:
    data = make()
    # Get .obs features for cells 5 through 9
    df = data.obs_features()[5:10]
    # Get .obs features for cell 3
    row = data.obs_features()[3]
    blocks, labels = df
    assert blocks[0]["cell_line"].tolist() == ["line2", "line0", "line1", "line2", "line0"]
    assert [str(label) for label in labels] == [H5AD]
    values, label = row
    assert "line0" in values
    assert str(label) == H5AD


def test_data_loader() -> None:
    from torch.utils.data import DataLoader

    from hbx_gpu.scdl import collate_sparse_matrix_batch

    data = make()
    model: Any = lambda x: x  # noqa: E731
    dataloader: Any = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    n_epochs = 2
    for _ in range(n_epochs):
        total = sum(float(model(batch).values().sum()) for batch in dataloader)
        assert total == counts(25, 34, seed=1).sum()


def test_data_type() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    data = SingleCellMemMapDataset("97e_scmm", H5AD, data_dtype="uint64")
    assert data.dtypes["data.npy"] == "uint64"


def test_casting_in_place() -> None:
    from hbx_gpu.scdl import SingleCellMemMapDataset

    make()
    ds = SingleCellMemMapDataset("97e_scmm")
    ds.cast_data_to_dtype("float64")  # or "uint16", "float32", etc.

    # Optionally reopen to verify
    reloaded = SingleCellMemMapDataset("97e_scmm")
    assert reloaded.dtypes["data.npy"] == "float64"
    assert reloaded.data.tolist() == ds.data.tolist() == counts(25, 34, seed=1).data.tolist()


@pytest.mark.parametrize("flag", ["--paginated_load_cutoff", "--paginated-load-cutoff"])
def test_the_command(folder: Path, flag: str) -> None:
    line = "--data-path hdf5s --save-path example_dataset --data-dtype float64"
    line += f" {flag} 10_000 --load-block-row-size 1_000_000 --use-X-not-raw"
    command = [sys.executable, "-m", "hbx_gpu._commands.convert_h5ad_to_scdl", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr

    from hbx_gpu.scdl import SingleCellMemMapDataset

    assert SingleCellMemMapDataset("example_dataset").dtypes["data.npy"] == "float64"


def test_neighbors() -> None:
    import anndata

    from hbx_gpu.scdl import NeighborSamplingStrategy, SingleCellMemMapDataset

    adata = anndata.read_h5ad(H5AD)
    neighbor_matrix = sp.csr_matrix(np.eye(25, k=1))
    adata.obsp["next_cell_ids"] = neighbor_matrix
    adata.write_h5ad(H5AD)
    # Load dataset with neighbor support
    data = SingleCellMemMapDataset(
        "dataset_path",
        H5AD,
        load_neighbors=True,  # Enable neighbor functionality
        neighbor_key="next_cell_ids",  # Key in AnnData.obsp containing neighbor information
        neighbor_sampling_strategy=NeighborSamplingStrategy.RANDOM,  # Strategy for sampling neighbors
        fallback_to_identity=True,  # Use cell itself as neighbor when no neighbors exist
    )
    for cell_index in (0, 24):
        # Get neighbor indices for a specific cell
        neighbor_indices = data.get_neighbor_indices_for_cell(cell_index)
        # Get neighbor weights (if available)
        neighbor_weights = data.get_neighbor_weights_for_cell(cell_index)
        # Sample a neighbor according to the configured strategy
        neighbor_index = data.sample_neighbor_index(cell_index)
        assert neighbor_indices.tolist() == ([] if cell_index == 24 else [1])
        assert neighbor_weights.tolist() == [1.0] * len(neighbor_indices)
        assert neighbor_index == min(cell_index + 1, 24)

    # Contrastive Learning - Compare cells with their neighbors. The README unpacks two items of the three.
    for cell_index in range(len(data)):
        current_cell_data, *_ = data.get_row(cell_index)
        neighbor_index = data.sample_neighbor_index(cell_index)
        neighbor_cell_data, *_ = data.get_row(neighbor_index)
        assert len(current_cell_data) == len(neighbor_cell_data) == 2
