"""What tests of the loader share: both executors, a reproducible order, and a dataset that is slow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hbx_gpu._datasets.base import Dataset
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu.batch import SparseBatch
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.sampler import CellSampler


class Executor:
    """`make_loader` of dense batches by one executor."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, dataset: Any, sampler: Any, **kwargs: Any) -> CellLoader:
        return make_loader(dataset, sampler, **{"layout": "dense", "executor": self.name, **kwargs})

    @property
    def inside(self) -> int:
        """Batches it holds beside those of the loader's own threads."""
        return 0 if self.name == "direct" else 2


def sampler_for(dataset: CellDataset, **kwargs: object) -> CellSampler:
    options: dict[str, object] = {"batch_size": 16, "seed": 3, "num_workers": 0, "locality": "none"} | kwargs
    return CellSampler(dataset.groups_np, **options)  # type: ignore[arg-type]


class Slow(Dataset[SparseBatch]):
    """A dataset whose batches take their time; counts how many were made."""

    n_features = 3
    columns: Mapping[str, np.ndarray] = {}

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.made = seconds, 0

    def __len__(self) -> int:
        return 1000

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        return [self.read_slowly(rows) for rows in selections]

    def read_slowly(self, rows: np.ndarray) -> SparseBatch:
        time.sleep(self.seconds)
        self.made += 1
        n = len(rows)
        columns, values, offsets = np.zeros(n, np.int32), rows.astype(np.float32), np.arange(n + 1)
        return SparseBatch(columns, values, offsets, self.n_features, metadata={"index": rows})

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        return [0] * len(selections)

    def with_row_numbers(self) -> Slow:
        return self
