"""Rows of an archive against copying the same bytes in the same process; bounds are several times that."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu._collates import sparse_to_csr_collate
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.sampler import CellSampler
from hbx_gpu.scdl._sources.cells import to_cell_dataset
from hbx_gpu.scdl._writing.writer import ArchiveWriter
from tests.scdl.files import adata  # noqa: F401 - keeps anndata's import out of the clocks

pytestmark = pytest.mark.timing

N_ROWS, N_GENES, LENGTH = 4000, 20_000, 1400


def best(work: Callable[[], object], repeats: int = 12) -> float:
    """Seconds of the fastest of some runs: the one that others disturbed least."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def archive(path: Path, n_rows: int, length: int) -> Path:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    step = N_GENES // length
    columns = (np.arange(length) * step + rng.integers(0, step, (n_rows, length))).ravel()
    values = rng.geometric(0.3, n_rows * length).astype("f4")
    with ArchiveWriter(path, n_columns=N_GENES) as writer:
        writer.append_rows(np.arange(n_rows + 1) * length, columns, values)
        writer.append_var(pa.table({"gene": [str(i) for i in range(N_GENES)]}), n_rows, label="")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return to_cell_dataset(archive(tmp_path_factory.mktemp("speed") / "archive", N_ROWS, LENGTH))


def test_random_rows_cost_a_few_copies(dataset: CellDataset) -> None:
    order = np.random.default_rng(1).permutation(N_ROWS)
    n = N_ROWS * LENGTH
    out = np.empty(2 * n, np.float32)
    source = np.ones(2 * n, np.float32)
    copying = best(lambda: np.copyto(out, source))
    whole = best(lambda: dataset[order])
    assert whole < 8 * copying  # 1.5 to 3 seen
    assert best(lambda: sparse_to_csr_collate(dataset[order])) < 14 * copying  # 3 to 4 seen


def test_short_rows_need_no_python_per_row(tmp_path: Path) -> None:
    """3 microseconds per row; a Python call per row and array takes more than twice that."""
    dataset = to_cell_dataset(archive(tmp_path / "archive", 20_000, 12))
    order = np.random.default_rng(1).permutation(20_000)
    assert best(lambda: dataset[order]) < 20_000 * 3e-6


def test_small_batches_share_a_plan(dataset: CellDataset) -> None:
    """A whole epoch through the loader in batches of 64 costs at most a few times that of one batch."""
    sampler = CellSampler(dataset.groups_np, batch_size=64, seed=0, locality="none", num_workers=0)
    with make_loader(dataset, sampler) as loader:
        epoch = best(lambda: sum(len(batch) for batch in loader), 5)
    whole = best(lambda: dataset[np.random.default_rng(0).permutation(N_ROWS)], 5)
    assert epoch < 8 * whole


def test_opening_does_not_depend_on_the_cells(tmp_path: Path) -> None:
    """A million rows: no Python per row, and 16 bytes for each."""
    path = archive(tmp_path / "archive", 1_000_000, 2)
    to_cell_dataset(path)
    assert best(lambda: to_cell_dataset(path), 3) < 1.0
    rows = to_cell_dataset(path).row_index
    assert (rows.source.nbytes + rows.start.nbytes + rows.length.nbytes) / len(rows) == 16
