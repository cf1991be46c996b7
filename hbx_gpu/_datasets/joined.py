"""Join several datasets into one with all of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._source import ObsColumns, RowIndex, Source
from hbx_gpu.errors import UnsupportedError


def joined(given: Sequence[object]) -> CellDataset:
    """Several datasets over the same columns as one: the rows of the first, then those of the second, ...

    Raises
    ------
    UnsupportedError
        A dataset does not have sparse rows, or has other features, layers or obs columns than the first.
    """
    datasets = [_of_sparse_rows(dataset) for dataset in given]
    first = datasets[0]
    for other in datasets:
        for what, mine, theirs in (
            ("layers", first.layers, other.layers),
            ("features", list(first.feature_uids), list(other.feature_uids)),
            ("obs columns", sorted(first.columns), sorted(other.columns)),
        ):
            if mine != theirs:
                raise UnsupportedError(
                    f"datasets with different {what} cannot be put together; select all rows with one query, "
                    "or make both datasets with the same arguments"
                )
    numbers: dict[int, int] = {}
    sources: list[Source] = []
    parts = []
    for dataset in datasets:
        at = np.empty(len(dataset.sources) + 1, np.int32)
        at[-1] = -1
        for i, source in enumerate(dataset.sources):
            if id(source) not in numbers:
                numbers[id(source)] = len(sources)
                sources.append(source)
            at[i] = numbers[id(source)]
        parts.append(at[dataset.row_index.source])
    index = [dataset.row_index for dataset in datasets]
    rows = RowIndex(
        np.concatenate(parts),
        np.concatenate([one.start for one in index]),
        np.concatenate([one.length for one in index]),
    )
    return CellDataset(
        sources,
        rows,
        layer=first.layers,
        n_features=first.n_features,
        feature_uids=first.feature_uids,
        obs=_joined_obs(datasets),
        feature_space=first.feature_space,
        reader=first.reader_kind,
    )


def _of_sparse_rows(dataset: object) -> CellDataset:
    if not isinstance(dataset, CellDataset) or type(dataset) is not CellDataset:
        raise UnsupportedError(
            f"only datasets of sparse rows can be put together, not {type(dataset).__name__}; select "
            "all rows with one query, and split them by row with dataset.subset()"
        )
    return dataset


def _joined_obs(datasets: Sequence[CellDataset]) -> ObsColumns:
    """Columns end to end; codes of vocabularies that differ are renumbered in the union of these."""
    columns, categories = {}, {}
    for name in datasets[0].columns:
        pieces = [dataset.columns[name] for dataset in datasets]
        words = [dataset.categories.get(name) for dataset in datasets]
        if any(one is None for one in words) and not all(one is None for one in words):
            raise UnsupportedError(f"column {name!r} holds labels in one dataset and numbers in another")
        if words[0] is not None:
            union = list(dict.fromkeys(word for one in words if one is not None for word in one.tolist()))
            at = {word: code for code, word in enumerate(union)}
            maps = [np.array([*(at[w] for w in one.tolist()), -1]) for one in words if one is not None]
            pieces = [codes[piece] for codes, piece in zip(maps, pieces, strict=True)]
            categories[name] = np.array(union, dtype=words[0].dtype)
        columns[name] = np.concatenate(pieces)
    return ObsColumns(columns, categories)
