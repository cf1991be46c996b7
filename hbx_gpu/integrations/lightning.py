"""Lightning's data module over a dataset: loaders of its splits.

A loader of :func:`hbx_gpu.dataloader.make_loader` needs no adapter: pass it to ``trainer.fit`` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hbx_gpu._source import GroupRuns
from hbx_gpu.dataloader import make_loader
from hbx_gpu.integrations._install import not_installed
from hbx_gpu.sampler import CellSampler, split_rows

if TYPE_CHECKING:
    from hbx_gpu._loading.loader import CellLoader

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise not_installed("lightning", error) from error

__all__ = ["SPLITS", "CellDataModule"]

SPLITS = ("train", "val", "test")
"""Names of the splits."""


class Cells(Protocol):
    """What the data module needs of a dataset beside what a loader needs."""

    @property
    def groups_np(self) -> np.ndarray:
        """Group of each row, int (n_rows,)."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Metadata of all rows."""

    @property
    def categories(self) -> Mapping[str, np.ndarray]:
        """What the codes of a column mean, by column."""

    def __len__(self) -> int: ...


class CellDataModule(LightningDataModule):
    """Loaders for training, validation, test and prediction over one dataset.

    Give either `split_by` or `fractions`; with neither, all rows are training rows.

    Parameters
    ----------
    dataset
        Dataset of cells with the metadata columns that are named here.
    split_by
        Column of the dataset that decides the split of each cell.
    splits
        Values of that column for ``"train"``, ``"val"`` and ``"test"``, for instance
        ``{"val": ["D7"], "test": ["D8", "D9"]}``. Without ``"train"``, all other rows that have a value are
        training rows. By default the column holds these three words themselves.
    fractions
        Share of the rows by split, for instance ``{"train": 0.8, "val": 0.2}``; see
        :func:`hbx_gpu.sampler.split_rows`.
    group_by
        Column whose values stay together, such as the donor: none is in two splits.
    stratify_by
        Column of which each split gets its share of every value.
    split_seed
        Seed of the random split.
    batch_size
        Cells of a batch on each device.
    seed
        Seed of the order of training batches. None: 0, so that all processes agree.
    sampler
        Makes the sampler of training batches from the int64 row numbers of the training split; by default a
        shuffled :class:`~hbx_gpu.sampler.CellSampler`.
    predict
        Split that ``trainer.predict`` goes through in the order of the dataset; None: all rows.
    **options
        Passed on to :func:`hbx_gpu.dataloader.make_loader`; `layout` is ``"dense"`` unless said otherwise.

    Attributes
    ----------
    rows
        int64 row numbers of each split, ascending, by name.

    Raises
    ------
    ValueError
        Both or contradicting ways to split are given, a split or column is unknown, or no row is left for
        training.
    """

    def __init__(
        self,
        dataset: Cells,
        *,
        split_by: str | None = None,
        splits: Mapping[str, Sequence[object]] | None = None,
        fractions: Mapping[str, float] | None = None,
        group_by: str | None = None,
        stratify_by: str | None = None,
        split_seed: int = 0,
        batch_size: int = 1024,
        seed: int | None = None,
        sampler: Callable[[np.ndarray], object] | None = None,
        predict: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if split_by is not None and fractions is not None:
            raise ValueError("split_by and fractions both say which split a row is in; pass one of them")
        if splits is not None and split_by is None:
            raise ValueError("splits names values of a column; pass split_by= too")
        if fractions is None and (group_by is not None or stratify_by is not None):
            raise ValueError("group_by and stratify_by are for a random split; pass fractions= too")
        _known_splits(fractions or splits or {})
        if predict is not None:
            _known_splits({predict: None})
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = 0 if seed is None else seed
        self._sampler = sampler
        self._predict = predict
        self._options = {"layout": "dense"} | options
        if split_by is not None:
            found = _by_column(dataset, split_by, splits)
        elif fractions is not None:
            found = split_rows(
                len(dataset),
                fractions,
                groups=None if group_by is None else codes_of(dataset, group_by),
                strata=None if stratify_by is None else codes_of(dataset, stratify_by),
                seed=split_seed,
            )
        else:
            found = {"train": np.arange(len(dataset))}
        self.rows = {name: found.get(name, np.empty(0, np.int64)) for name in SPLITS}

    def train_dataloader(self) -> CellLoader:
        """Loader of the training rows, shuffled anew in each epoch.

        Raises
        ------
        ValueError
            The training split is empty.
        """
        rows = self.rows["train"]
        if not len(rows):
            raise ValueError("no row is in the training split; see the attribute rows of this data module")
        if self._sampler is not None:
            return make_loader(self.dataset, self._sampler(rows), **self._options)
        order = CellSampler(GroupRuns.one(len(self.dataset)), self.batch_size, seed=self.seed, rows=rows)
        return make_loader(self.dataset, order, **self._options)

    def val_dataloader(self) -> CellLoader | list[object]:
        """Loader of the validation rows in the order of the dataset; an empty list where there are none."""
        return self._in_order(self.rows["val"])

    def test_dataloader(self) -> CellLoader | list[object]:
        """Loader of the test rows in the order of the dataset; an empty list where there are none."""
        return self._in_order(self.rows["test"])

    def predict_dataloader(self) -> CellLoader | list[object]:
        """Loader of the rows to predict, in the order of the dataset."""
        return self._in_order(
            np.arange(len(self.dataset)) if self._predict is None else self.rows[self._predict]
        )

    def _in_order(self, rows: np.ndarray) -> CellLoader | list[object]:
        if not len(rows):
            return []
        order = CellSampler(GroupRuns.one(len(self.dataset)), self.batch_size, shuffle=False, rows=rows)
        return make_loader(self.dataset, order, **self._options)


def codes_of(dataset: Cells, column: str) -> np.ndarray:
    """Integer codes (n_rows,) of a column: its own where it has categories, else numbers of its values.

    Missing values have code -1.

    Raises
    ------
    ValueError
        The dataset does not carry the column.
    """
    if column not in dataset.columns:
        raise ValueError(
            f"the dataset has no column {column!r}, only {sorted(dataset.columns)}; name it when the dataset "
            f"is made: to_cell_dataset(..., metadata_columns=[{column!r}])"
        )
    values = np.asarray(dataset.columns[column])
    if column in dataset.categories:
        return values
    codes = np.unique(values, return_inverse=True)[1].astype(np.int64)
    codes[values != values] = -1  # NaN and NaT differ from themselves
    return codes


def _known_splits(names: Mapping[str, object]) -> None:
    if strangers := sorted(set(names) - set(SPLITS)):
        raise ValueError(f"splits are called {', '.join(map(repr, SPLITS))}, got {strangers}")


def _by_column(
    dataset: Cells, column: str, splits: Mapping[str, Sequence[object]] | None
) -> dict[str, np.ndarray]:
    codes = codes_of(dataset, column)
    values = dataset.categories.get(column)
    if values is None:
        values = np.unique(np.asarray(dataset.columns[column]))
    code_of = {value: code for code, value in enumerate(np.asarray(values).tolist())}
    if splits is None:
        wanted: dict[str, Sequence[object]] = {name: [name] for name in SPLITS if name in code_of}
        if not wanted:
            raise ValueError(
                f"the column {column!r} holds none of {', '.join(map(repr, SPLITS))}, only "
                f"{list(code_of)[:10]}; say with splits= which values belong to which split"
            )
    else:
        wanted = dict(splits)
    lists = [(name, value) for name, found in wanted.items() for value in found]
    if unknown := sorted(str(value) for _, value in lists if value not in code_of):
        raise ValueError(f"the column {column!r} has no value {unknown}, only {list(code_of)[:10]}")
    named = [value for _, value in lists]
    if twice := sorted({str(value) for value in named if named.count(value) > 1}):
        raise ValueError(f"{twice} of the column {column!r} is in two splits; name each value once")
    split = {
        name: np.flatnonzero(np.isin(codes, [code_of[value] for value in found]))
        for name, found in wanted.items()
    }
    if splits is not None and "train" not in splits:
        rest = (codes >= 0) & ~np.isin(codes, [code_of[value] for value in named])
        split["train"] = np.flatnonzero(rest)
    return split
