"""Turn torch's subsets, concatenations and samplers of rows into datasets and batch samplers of ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sized
from typing import Protocol, runtime_checkable

import numpy as np
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hbx_gpu._datasets.joined import joined
from hbx_gpu._datasets.plain import HasCells
from hbx_gpu._loading.framework_samplers import Batches
from hbx_gpu._loading.order import GivenOrder, Order, cannot_be_iterated
from hbx_gpu._source import GroupRuns
from hbx_gpu.sampler import CellSampler

_BATCH_SIZE = 1024  # default of CellSampler
_SAMPLERS_OF_ROWS = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


@runtime_checkable
class Selectable(Protocol):
    """A dataset that can return some of its rows as a dataset."""

    def subset(self, rows: np.ndarray) -> object: ...


def unwrapped(dataset: object) -> object:
    """Turn what has cells, or a torch `Subset` or `ConcatDataset` of our datasets, into a dataset of ours.

    Rows are numbered as torch numbers them. Any other dataset is returned as it is.

    Raises
    ------
    TypeError
        It is a path, which has to be opened first.
    """
    if isinstance(dataset, str | os.PathLike):
        raise TypeError(
            f"a loader needs a dataset, not a path: pass hbx_gpu.open({os.fspath(dataset)!r}), or a query of "
            "RaggedAtlas.checkout_latest(path)"
        )
    if isinstance(dataset, HasCells):
        return dataset.to_cell_dataset()
    if isinstance(dataset, Subset):
        whole = _of_ours(dataset.dataset)
        return dataset if whole is None else whole.subset(np.asarray(dataset.indices, np.int64))
    if isinstance(dataset, ConcatDataset):
        if (rows := _rows_of_one(dataset)) is not None and isinstance(rows[0], Selectable):
            return rows[0].subset(rows[1])
        found = [_of_ours(part) for part in dataset.datasets]
        parts = [part for part in found if part is not None]
        return joined(parts) if len(parts) == len(found) else dataset
    return dataset


def _rows_of_one(dataset: object) -> tuple[object, np.ndarray] | None:
    """The dataset and its rows, where all parts of a concatenation or subset are from one of ours.

    Datasets of every kind have subsets, while only those of sparse rows can be put together.
    """
    if isinstance(dataset, Subset):
        whole = _rows_of_one(dataset.dataset)
        return None if whole is None else (whole[0], whole[1][np.asarray(dataset.indices, np.int64)])
    if isinstance(dataset, ConcatDataset):
        parts = [_rows_of_one(part) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or any(whole is not found[0][0] for whole, _ in found):
            return None
        return found[0][0], np.concatenate([rows for _, rows in found])
    if not isinstance(dataset, Selectable) or not isinstance(dataset, Sized):
        return None
    return dataset, np.arange(len(dataset))


def _of_ours(dataset: object) -> Selectable | None:
    """The dataset that is wrapped, or converts to one of ours; None for others."""
    dataset = unwrapped(dataset)
    return dataset if isinstance(dataset, Selectable) else None


def order_for(
    dataset: object,
    sampler: object,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    seed: int | None = None,
) -> object:
    """The sampler of batches that a loader's arguments ask for.

    Raises
    ------
    ValueError
        `batch_size`, `shuffle`, `drop_last` or `seed` is given together with a sampler that decides them.
    TypeError
        The sampler is a number.
    """
    if isinstance(sampler, int | np.integer):
        raise TypeError(
            "the second argument is the sampler, not the batch size: "
            f"make_loader(dataset, batch_size={sampler})"
        )
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise TypeError(
                f"a {type(dataset).__name__} does not tell how many rows it has; pass a dataset, such as "
                "atlas.query().to_cell_dataset(), or a sampler"
            )
        return CellSampler(
            GroupRuns.one(len(dataset)),
            _BATCH_SIZE if batch_size is None else batch_size,
            bool(shuffle),
            seed,
            bool(drop_last),
        )
    given = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": seed}
    of_batches = isinstance(sampler, BatchSampler | Batches | GivenOrder | Order)
    of_rows = isinstance(sampler, _SAMPLERS_OF_ROWS) and not of_batches
    if of_rows or (batch_size is not None and not of_batches):
        given |= {"batch_size": None, "drop_last": None}
        if not isinstance(sampler, Iterable):
            raise cannot_be_iterated(sampler)
        sampler = BatchSampler(sampler, _BATCH_SIZE if batch_size is None else batch_size, bool(drop_last))
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(wrong)}: the sampler decides this; set it there")
    return sampler
