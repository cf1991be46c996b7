"""`compute`: one pass over the chunks of a dataset, on threads or on any executor."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from hbx_gpu._advice import option
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._devices import cores, free_host_memory
from hbx_gpu._executors import in_turn, result_of
from hbx_gpu._progress import Progress, checked
from hbx_gpu._protocols import AnyLoadable
from hbx_gpu.errors import ResourceError, UnsupportedError
from hbx_gpu.statistics._finish import Asked, finished
from hbx_gpu.statistics._partial import Partial
from hbx_gpu.statistics._result import Statistics
from hbx_gpu.statistics._tasks import Groups, Matrix, Task, Tasks, measured, prepared, run

EXACT_MEDIANS = 1 << 24
"""Medians are exact in datasets of at most this many stored values: 16 bytes each are kept until the end."""

_LEAST, _MOST = 1 << 20, 1 << 27  # values of a task
_FEW = 8  # tasks that a small dataset is cut into
_AHEAD = 64  # tasks that an executor is given before their turn
_CELL_BYTES = 64  # of the sums of one feature in one group


def compute(
    dataset: AnyLoadable,
    by: str | None = None,
    *,
    target_sum: float | None = 10_000.0,
    medians: bool = True,
    executor: Executor | None = None,
    progress: Progress | None = None,
    exact_medians: int = EXACT_MEDIANS,
) -> Statistics:
    """Statistics of the features of a dataset, in one pass over its chunks in the order of storage.

    Whole numbers are counted and summed in integers: how rows are cut into tasks, and which of them ends
    first, changes no bit of the result.

    Parameters
    ----------
    dataset
        Cells of one matrix, sparse or dense, made by ``to_cell_dataset``.
    by
        obs column among the dataset's metadata; the result then has ``groups``.
    target_sum
        Medians are those of values divided by the sum of their cell over the dataset's features, multiplied
        by this: what rank-value tokens need. None: of values as they are.
    medians
        False leaves medians out, which takes less memory.
    executor
        Any ``concurrent.futures.Executor``: its workers need the paths of the data only. None: a thread for
        each core of this process.
    progress
        Called with the number of cells that were read, and their total.
    exact_medians
        Number of stored values up to which medians are exact; beyond it, they have a relative error of at
        most 1/128.

    Returns
    -------
    Statistics
        One entry per feature: cells measured, nonzero cells, sum, mean, variance and median.

    Raises
    ------
    UnsupportedError
        The dataset has no features (one of images, for example) or several modalities, or `by` has more than
        10,000 values.
    UnknownNameError
        The dataset does not carry `by`.
    ResourceError
        Groups times features take more memory than there is, or workers of the executor are gone.
    ValueError
        `target_sum` is not above 0.
    """
    progress = checked(progress)
    if target_sum is not None and not 0 < target_sum < math.inf:
        raise ValueError(f"target_sum must be above 0, or None for values as they are; got {target_sum}")
    matrix = _checked(dataset)
    groups = Groups.by(matrix, by)
    tasks = Tasks(matrix)
    workers = cores() if executor is None else 1
    _check_memory(matrix, groups, workers)
    target = -1.0 if not medians else 0.0 if target_sum is None else float(target_sum)
    exact = medians and tasks.n_values <= exact_medians
    size = min(max(tasks.n_values // _FEW, _LEAST), _MOST)
    cuts = tasks.cuts(0, len(tasks), size)
    pickled = b"" if executor is None else pickle.dumps(matrix, protocol=pickle.HIGHEST_PROTOCOL)
    parts = [Task(pickled, by, *ends, target, exact) for ends in itertools.pairwise(cuts)]

    total = Partial(matrix.n_features, groups.n, target, exact=exact)
    if executor is None:
        plain = prepared(matrix)
        with ThreadPoolExecutor(workers, "hbx_gpu-statistics") as threads:
            works = [partial(run, plain, tasks, groups, task) for task in parts]
            results = _in_order(threads, works, workers + 1)
            _add_all(total, results, parts, progress)
    else:
        _add_all(total, _in_order(executor, parts, _AHEAD), parts, progress)
    n_cells, has = measured(matrix, groups)
    asked = Asked(matrix.feature_uids, by, groups.names, n_cells, has, target_sum if medians else None)
    return finished(total, asked)


def _checked(dataset: AnyLoadable) -> Matrix:
    if isinstance(dataset, CellDataset) or (
        isinstance(dataset, DenseCellDataset) and dataset.kind == "matrix"
    ):
        return dataset
    raise UnsupportedError(
        f"statistics are made of the cells of one matrix, and this is a {type(dataset).__name__}; choose a "
        f"modality that has features with {option('feature_space')}"
    )


def _check_memory(dataset: Matrix, groups: Groups, workers: int) -> None:
    needed = dataset.n_features * groups.n * _CELL_BYTES * (workers + 1)
    if needed > (free := free_host_memory()):
        raise ResourceError(
            f"{groups.n:,} groups x {dataset.n_features:,} features x {_CELL_BYTES} bytes x {workers + 1} "
            f"partial results take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; group by a "
            "column with fewer values"
        )


def _in_order(executor: Executor, tasks: Sequence[Callable[[], Partial]], ahead: int) -> Iterator[Partial]:
    """Results in the order of the tasks; at most `ahead` of these are under way."""
    for _, future in in_turn(executor, _call, ((None, (task,)) for task in tasks), window=ahead):
        yield result_of(future, "statistics", goes_on=False)


def _call(task: Callable[[], Partial]) -> Partial:
    return task()


def _add_all(total: Partial, results: Iterator[Partial], tasks: list[Task], progress: Progress) -> None:
    rows, all_rows = 0, tasks[-1].last if tasks else 0
    for result, task in zip(results, tasks, strict=True):
        total.merge(result)
        rows += task.last - task.first
        progress(rows, all_rows)
