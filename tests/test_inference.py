"""Results in the order of the dataset: every row once or an error, from two ranks, in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from hbx_gpu import inference
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.dataloader import make_loader
from hbx_gpu.inference import RowWriter, gather_rows
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups, expected_dense
from tests import fresh
from tests.emulation.build import outer_environment

N_ROWS = 120


def results(rows: object) -> torch.Tensor:
    return torch.as_tensor(rows)[:, None] * torch.tensor([1.0, -0.5])


def test_results_of_a_shuffled_order_come_back_in_dataset_order(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path)
    loader = make_loader(dataset, CellSampler(dataset.groups_np, 32, seed=1), layout="dense")
    batches = [(batch["X"], batch["index"]) for batch in loader]
    found = gather_rows([x for x, _ in batches], [index for _, index in batches], n_rows=len(dataset))
    assert np.array_equal(found.numpy(), expected_dense(example_groups(), N_FEATURES))


@pytest.mark.parametrize(
    ("rows", "n_rows", "told"),
    [
        (
            [0, 1, 1, 3],
            4,
            "1 rows are missing, the first is 2 and 1 rows come more than once, the first is 1",
        ),
        ([0, 1, 2], 4, "1 rows are missing, the first is 3"),
        ([0, 4, 1], None, "result for row 4, but the dataset has 3 rows"),
        ([0, -1, 1], None, "result for row -1"),
        ([], 2, "no rank has a result"),
    ],
)
def test_rows_missing_or_twice(rows: list[int], n_rows: int | None, told: str) -> None:
    given = torch.tensor(rows, dtype=torch.int64)
    with pytest.raises(ValueError, match=told):
        gather_rows([results(given)] if rows else [], [given] if rows else [], n_rows=n_rows)
    assert gather_rows([], []).shape == (0,)


def test_results_that_do_not_fit_their_rows() -> None:
    with pytest.raises(ValueError, match="one row number for each of 3 results"):
        gather_rows(torch.zeros(3, 2), torch.arange(2))
    with pytest.raises(ValueError, match="must hold integers"):
        gather_rows(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="outputs must be a tensor, a NumPy array, or a list of these"):
        gather_rows([1.0], torch.arange(1))  # type: ignore[list-item]


def test_numpy_arrays_are_results_too() -> None:
    rows = np.array([2, 0, 1])
    wanted = results(np.arange(3))
    assert torch.equal(gather_rows(results(rows).numpy(), rows), wanted)
    assert torch.equal(
        gather_rows([results(rows[:1]), results(rows[1:]).numpy()], [rows[:1], rows[1:]]), wanted
    )


def h5ad(path: Path, n_cells: int) -> Path:
    anndata.AnnData(np.ones((n_cells, 3), np.float32)).write_h5ad(path)
    return path


def test_embeddings_beside_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BLOCK", 64)  # several blocks
    path = h5ad(tmp_path / "cells.h5ad", N_ROWS)
    order = np.random.default_rng(0).permutation(N_ROWS)
    with RowWriter(path, N_ROWS, 2, key="X_model") as writer:
        for part in np.array_split(order, 7):
            writer.write(results(part).to(torch.bfloat16).float(), torch.from_numpy(part))
    read = anndata.read_h5ad(path)
    assert read.obsm["X_model"].dtype == np.float32
    assert np.array_equal(read.obsm["X_model"], results(range(N_ROWS)).to(torch.bfloat16).float())
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        RowWriter(path, N_ROWS, 2, key="X_model")
    with RowWriter(path, N_ROWS, 1, key="X_model", overwrite=True) as writer:
        writer.write(np.zeros((N_ROWS, 1)), np.arange(N_ROWS))
    assert anndata.read_h5ad(path).obsm["X_model"].shape == (N_ROWS, 1)


def test_embeddings_of_some_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BLOCK", 16)
    path = h5ad(tmp_path / "cells.h5ad", 6)
    with RowWriter(path, 3, 2, key="X_model", cells=np.array([4, 0, 2])) as writer:
        writer.write(results([0, 1, 2]), np.arange(3))
    found = anndata.read_h5ad(path).obsm["X_model"]
    assert np.array_equal(found[[4, 0, 2]], results([0, 1, 2]))
    assert np.isnan(found[[1, 3, 5]]).all()


def test_a_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with RowWriter(path, 4, 2, dtype="int32") as writer:
        writer.write(results([2, 3]).int(), torch.tensor([2, 3]))
        writer.write(results([0, 1]).int(), torch.tensor([0, 1]))
    assert np.array_equal(np.load(path), results(range(4)).int())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        RowWriter(path, 4, 2)


@pytest.mark.parametrize(
    ("rows", "values", "told"),
    [
        ([0, 1], 3, "expected results of shape"),
        ([0, 4], 2, "must lie in 0 .. 3, got 0 .. 4"),
        ([1, 1], 2, "written before"),
        ([0, 1], 2, "2 rows are missing, the first is 2"),
    ],
)
def test_a_file_that_would_lack_rows_is_not_written(
    tmp_path: Path, rows: list[int], values: int, told: str
) -> None:
    path = h5ad(tmp_path / "cells.h5ad", 4)
    with pytest.raises(ValueError, match=told), RowWriter(path, 4, 2, key="X_model") as writer:
        writer.write(np.zeros((2, values)), np.array(rows))
    assert "X_model" not in anndata.read_h5ad(path).obsm
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("cells.h5ad", {}, "needs key="),
        ("rows.npy", {"key": "X_model"}, "a .npy file has no key"),
        ("rows.txt", {}, "write results to a .npy file"),
        ("cells.h5ad", {"key": "a", "n": 3}, "has 4 cells, and the dataset 3 rows: say with cells="),
        ("cells.h5ad", {"key": "a", "n": 2, "cells": [1, 1]}, "2 different numbers of cells"),
        ("cells.h5ad", {"key": "a", "n": 1, "cells": [1], "dtype": "int8"}, "get NaN, which int8"),
    ],
)
def test_targets_that_do_not_fit(tmp_path: Path, name: str, arguments: dict[str, object], told: str) -> None:
    h5ad(tmp_path / "cells.h5ad", 4)
    options = dict(arguments)
    cells = options.pop("cells", None)
    with pytest.raises(ValueError, match=told):
        RowWriter(
            tmp_path / name,
            int(options.pop("n", 4)),  # type: ignore[call-overload]
            2,
            cells=None if cells is None else np.array(cells),
            **options,  # type: ignore[arg-type]
        )


JOB = """
import json, sys
import numpy as np
import torch
import torch.distributed as dist
from hbx_gpu.inference import RowWriter, gather_rows
from hbx_gpu.sampler import CellSampler

folder, rank = sys.argv[1], int(sys.argv[2])
sampler = CellSampler(np.zeros(101, int), 16, shuffle=False)  # before the process group exists
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
rows = [torch.tensor(batch) for batch in sampler]
outputs = [batch[:, None] * torch.tensor([1.0, -0.5]) for batch in rows]
whole = gather_rows(outputs, rows, n_rows=101)
only = torch.arange(5)
from_one = gather_rows([only * 2] if rank else [], [only] if rank else [])
try:
    gather_rows(only, only)
except ValueError as error:
    told = str(error)
with RowWriter(f"{folder}/rows.npy", 101, 2) as writer:
    for values, index in zip(outputs, rows):
        writer.write(values, index)
cells = json.load(open(f"{folder}/cells.json"))
with RowWriter(f"{folder}/atlas", 101, 2, key="X_model", cells=cells) as writer:
    for values, index in zip(outputs, rows):
        writer.write(values, index)
try:
    with RowWriter(f"{folder}/taken.npy", 101, 2) as writer:
        for values, index in zip(outputs, rows):
            writer.write(values, index)
        if rank == 0:
            import os
            os.mkdir(f"{folder}/taken.npy")
    failed = "nothing"
except (RuntimeError, OSError) as error:
    failed = str(error)
found = {"failed": failed, "whole": whole.tolist(), "from_one": from_one.tolist(), "told": told}
found["rows"] = sum(len(batch) for batch in rows)
open(f"{folder}/rank{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    adata = anndata.AnnData(np.ones((101, 3), np.float32))
    atlas = create_or_open_atlas(tmp_path / "atlas")
    atlas.add_from_anndata(adata)
    atlas.optimize()
    atlas.snapshot()
    cells = RaggedAtlas.checkout_latest(tmp_path / "atlas").query().to_arrow()["uid"].to_pylist()
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    environment = outer_environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}
    jobs = [
        fresh.popen(
            [sys.executable, script, tmp_path, rank],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [job.communicate(timeout=120)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], outputs
    expected = results(range(101)).tolist()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["whole"] == expected
        assert found["from_one"] == [0, 2, 4, 6, 8]
        assert "5 rows come more than once" in found["told"]
        assert 0 < found["rows"] < 101
        assert "taken.npy" in found["failed"]
        assert found["failed"].startswith("the first rank could not write") == bool(rank)
    assert np.load(tmp_path / "rows.npy").tolist() == expected
    query = RaggedAtlas.checkout_latest(tmp_path / "atlas").query()
    assert np.array_equal(query.to_array("X_model"), expected)
