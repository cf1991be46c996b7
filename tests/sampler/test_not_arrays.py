"""What a sampler is given in place of an array, by mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu import CellDataset, CellSampler
from hbx_gpu.sampler import BalancedCellSampler, GroupedCellSampler, WeightedCellSampler, split_rows
from hbx_gpu.testing import example_dataset, example_groups


@pytest.mark.parametrize(
    "make",
    [
        lambda given: CellSampler(given, batch_size=4),
        lambda given: CellSampler(np.zeros(5, int), batch_size=4, rows=given),
        lambda given: CellSampler(np.zeros(5, int), batch_size=4, length_group=2, lengths=given),
        lambda given: BalancedCellSampler(given, batch_size=4),
        lambda given: GroupedCellSampler(given, batch_size=4),
        lambda given: WeightedCellSampler(given, batch_size=4),
        lambda given: split_rows(5, {"train": 1.0}, groups=given),
    ],
)
def test_a_dataset_or_a_table_is_not_an_array(make: Callable[[object], object], tmp_path: Path) -> None:
    dataset: CellDataset = example_dataset(tmp_path, example_groups())
    for given in (dataset, {"a": 1}):
        with pytest.raises(ValueError, match=f"got a {type(given).__name__}"):
            make(given)


def test_fractions_are_named() -> None:
    with pytest.raises(TypeError, match=r"fractions must be a mapping of names to shares.*got a list"):
        split_rows(10, [0.8, 0.2])  # type: ignore[arg-type]
