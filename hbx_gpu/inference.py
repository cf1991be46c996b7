"""Results of a model, row by row, back in the order of the dataset and beside the cells.

Ranks and shuffled orders hand batches out in any order. Their row numbers (``batch["index"]``) say where each
result belongs; here that is checked: every row once, or an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = torch.Tensor
    Rows: TypeAlias = Tensor | np.ndarray

__all__ = ["RowWriter", "gather_rows"]

_BLOCK = 64 << 20  # bytes that are copied into a file at a time


def gather_rows(
    outputs: Rows | Sequence[Rows], index: Rows | Sequence[Rows], *, n_rows: int | None = None
) -> Tensor:
    """Results of all ranks in the order of the dataset.

    Every rank calls this, also one that got no batch.

    Parameters
    ----------
    outputs
        Results of this rank: one tensor or NumPy array (n, ...), or one for each of its batches.
    index
        Row numbers of these results, int64 (n,): ``batch["index"]``, in the same form.
    n_rows
        Number of rows of the dataset. None: as many as there are results on all ranks.

    Returns
    -------
    torch.Tensor
        (n_rows, ...), on the device of the results: row i is the result for row i. All ranks get all rows.

    Raises
    ------
    ValueError
        A row is missing or comes more than once, or results and row numbers do not fit together.
    """
    import torch

    values, rows = _joined(outputs, "outputs"), _joined(index, "index")
    if rows is None or values is None:
        values = rows = None
    elif rows.ndim != 1 or len(rows) != len(values):
        raise ValueError(
            f"index must have one row number for each of {len(values)} results, got shape {tuple(rows.shape)}"
        )
    elif rows.dtype.is_floating_point:
        raise ValueError(f"index must hold integers, got {rows.dtype}")
    if (gathered := _from_all_ranks(values, rows)) is None:
        if n_rows:
            raise ValueError(f"no rank has a result, but the dataset has {n_rows} rows")
        return torch.empty(0)
    values, rows = gathered
    _check_once(rows.cpu().numpy(), len(rows) if n_rows is None else n_rows)
    result = torch.empty_like(values)
    result[rows.to(values.device)] = values
    return result


def _joined(parts: Rows | Sequence[Rows], name: str) -> Tensor | None:
    import torch

    def tensor(part: Rows) -> Tensor:
        return torch.as_tensor(part).detach()

    if isinstance(parts, torch.Tensor | np.ndarray):
        return tensor(parts)
    if wrong := [type(part).__name__ for part in parts if not isinstance(part, torch.Tensor | np.ndarray)]:
        raise ValueError(
            f"{name} must be a tensor, a NumPy array, or a list of these, got a list with a {wrong[0]}"
        )
    return torch.cat([tensor(part) for part in parts]) if len(parts) else None


def _process_group() -> bool:
    """Whether there are several ranks. Whoever initialized torch.distributed has imported it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _from_all_ranks(values: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The results and row numbers of all ranks, rank after rank; None if there are none."""
    if not _process_group():
        return None if values is None or rows is None else (values, rows.long())
    import torch
    import torch.distributed as dist

    mine = None if values is None else (len(values), tuple(values.shape[1:]), values.dtype)
    every: list[tuple[int, tuple[int, ...], torch.dtype] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    there = [found for found in every if found is not None]
    if not there:
        return None
    if len({found[1:] for found in there}) > 1:
        raise ValueError(f"ranks have results of different shapes or types: {[found[1:] for found in there]}")
    most, (_, tail, dtype) = max(found[0] for found in there), there[0]
    counts = [0 if found is None else found[0] for found in every]
    # Collectives need equal shapes: each rank sends as many rows as the one with most of them.
    device = values.device if values is not None else _collective_device()

    def gathered(part: Tensor | None, tail: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        padded = torch.zeros((most, *tail), dtype=dtype, device=device)
        if part is not None:
            padded[: len(part)] = part.to(device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return gathered(values, tail, dtype), gathered(rows, (), torch.int64)


def _collective_device() -> torch.device:
    import torch
    import torch.distributed as dist

    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_once(rows: np.ndarray, n_rows: int) -> None:
    """Raise an error unless each of the rows 0 .. n_rows - 1 is there once."""
    if len(rows) and (rows.min() < 0 or rows.max() >= n_rows):
        wrong = int(rows.min()) if rows.min() < 0 else int(rows.max())
        raise ValueError(
            f"there is a result for row {wrong}, but the dataset has {n_rows} rows; pass n_rows=len(dataset)"
        )
    _check_counts(np.bincount(rows, minlength=n_rows))


def _check_counts(times: np.ndarray) -> None:
    if (times == 1).all():
        return
    missing, twice = np.flatnonzero(times == 0), np.flatnonzero(times > 1)
    told = [f"{len(missing)} rows are missing, the first is {missing[0]}"] if len(missing) else []
    told += [f"{len(twice)} rows come more than once, the first is {twice[0]}"] if len(twice) else []
    raise ValueError(
        f"of {len(times)} rows each must come once, but {' and '.join(told)}. Go through the dataset with "
        "CellSampler(dataset.groups_np, shuffle=False), which gives every row once, on any number of ranks; "
        "use no sampler that leaves rows out or repeats them"
    )


class RowWriter:
    """Writes results of all ranks to a file or an atlas while they come, in the order of the dataset.

    A context manager: the file gets the results when the context ends without an error and every row was
    written once. Until then they lie in a file of their size beside it: they may be larger than memory. All
    ranks make a writer of the same arguments, on the same file system.

    Parameters
    ----------
    path
        A ``.npy`` file to write, an ``.h5ad`` file that exists and gets an array in ``obsm``, or the
        directory of an atlas, which gets a dense modality and a snapshot that has it.
    n_rows
        Number of rows of the dataset: ``len(dataset)``.
    n_columns
        Number of columns of the results.
    key
        Name in ``obsm`` of an ``.h5ad`` file, or of the modality of an atlas.
    dtype
        dtype of the results; float32 or float16 for an atlas.
    cells
        Which cell each row of the dataset is, (n_rows,). For an ``.h5ad`` file int64 numbers of its cells, or
        None: row i is cell i, and the file has as many cells as the dataset has rows. Other cells get NaN.
        For an atlas the ``uid`` of each cell: ``query.to_modality_obs(...)["uid"]``. Other cells lack the
        modality.
    overwrite
        Whether a result that is there already is replaced.

    Raises
    ------
    ValueError
        The arguments do not fit together, or when the context ends, a row is missing or was written twice.
    FileExistsError
        The result is there already, and `overwrite` is false.
    AtlasLockedError
        When the context ends, another process is writing to the atlas.
    RuntimeError
        On other ranks than the first, when that one could not write the results.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_rows: int,
        n_columns: int,
        *,
        key: str | None = None,
        dtype: DTypeLike = "float32",
        cells: Sequence[str] | np.ndarray | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._shape = (n_rows, n_columns)
        self._dtype = np.dtype(dtype)
        self._target = _target(self.path, self._shape, self._dtype, key, cells, overwrite)
        self._beside = self.path.with_name(f".{self.path.name}.{key or 'rows'}.partial.npy")
        self._times = np.zeros(n_rows, np.uint8)
        self._array: np.memmap | None = None

    def __enter__(self) -> RowWriter:
        if _rank() == 0:
            np.lib.format.open_memmap(self._beside, "w+", self._dtype, self._shape).flush()
        _barrier()
        self._array = np.lib.format.open_memmap(self._beside, "r+")
        return self

    def write(self, values: Tensor | np.ndarray, index: Tensor | np.ndarray) -> None:
        """Write the results of a batch.

        Parameters
        ----------
        values
            (n, n_columns), on any device.
        index
            int64 (n,), their row numbers: ``batch["index"]``.

        Raises
        ------
        ValueError
            The shapes do not fit, a row number is out of range, or a row was written before.
        """
        if self._array is None:
            raise ValueError("write inside the context: with RowWriter(...) as writer: writer.write(...)")
        rows, results = _host(index).astype(np.int64, copy=False), _host(values)
        if results.shape != (len(rows), self._shape[1]):
            raise ValueError(
                f"expected results of shape {(len(rows), self._shape[1])} for {len(rows)} row numbers, got "
                f"{results.shape}"
            )
        if len(rows) and (rows.min() < 0 or rows.max() >= self._shape[0]):
            raise ValueError(
                f"row numbers must lie in 0 .. {self._shape[0] - 1}, got {rows.min()} .. {rows.max()}"
            )
        if len(np.unique(rows)) != len(rows) or self._times[rows].any():
            raise ValueError("a row was written before; each must come once, from any rank")
        self._array[rows] = results
        self._times[rows] = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        array, self._array = self._array, None
        assert array is not None
        try:
            if kind is None:
                array.flush()
                _check_counts(_summed(self._times))
                failure = None
                if _rank() == 0:
                    try:
                        self._target.finish(array, self._beside)
                    except Exception as caught:
                        failure = caught
                _agree(failure)
        finally:
            if _rank() == 0:
                self._beside.unlink(missing_ok=True)


class _Target(Protocol):
    """Where a :class:`RowWriter` puts its results."""

    def finish(self, array: np.memmap, beside: Path) -> None:
        """Put whole results in place. `array` is a map of the file `beside`, which may be moved."""


def _target(
    path: Path,
    shape: tuple[int, int],
    dtype: np.dtype,
    key: str | None,
    cells: Sequence[str] | np.ndarray | None,
    overwrite: bool,
) -> _Target:
    if path.suffix == ".h5ad" or (path / "lance_db").is_dir():
        if key is None:
            raise ValueError(
                f"{path}: an .h5ad file or an atlas needs key=, the name in obsm or of the modality; to "
                "write a file of its own, choose one that ends in .npy"
            )
        if path.suffix == ".h5ad":
            numbers = None if cells is None else np.asarray(cells)
            return _Obsm(path, shape, dtype, key, numbers, overwrite=overwrite)
        return _Modality(path, shape, dtype, key, cells, overwrite=overwrite)
    if path.suffix != ".npy":
        raise ValueError(
            f"{path}: write results to a .npy file, to an .h5ad file with key=, or to an atlas with key= and "
            "cells="
        )
    if key is not None:
        raise ValueError(f"{path}: a .npy file has no key; leave key= out")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    return _Npy(path)


class _Npy:
    """A file of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def finish(self, array: np.memmap, beside: Path) -> None:  # noqa: ARG002 - of the protocol
        os.replace(beside, self._path)


class _Obsm:
    """An array in ``obsm`` of an .h5ad file."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: np.dtype,
        key: str,
        cells: np.ndarray | None,
        *,
        overwrite: bool,
    ) -> None:
        import h5py

        self._path, self._key, self._cells = path, key, cells
        with h5py.File(path, "r") as file:
            if key in file.get("obsm", ()) and not overwrite:
                raise FileExistsError(f"{path} has obsm[{key!r}] already; pass overwrite=True to replace it")
            obs = file["obs"]
            n_cells = len(obs[obs.attrs["_index"]])
        if cells is None:
            if n_cells != shape[0]:
                raise ValueError(
                    f"{path} has {n_cells} cells, and the dataset {shape[0]} rows: say with "
                    "cells= which cell each row is"
                )
        elif (
            cells.shape != shape[:1]
            or cells.dtype.kind not in "iu"
            or len(np.unique(cells)) != len(cells)
            or not (len(cells) == 0 or (cells.min() >= 0 and cells.max() < n_cells))
        ):
            raise ValueError(
                f"cells must hold {shape[0]} different numbers of cells of {path}, 0 to {n_cells - 1}"
            )
        if cells is not None and dtype.kind != "f" and len(cells) < n_cells:
            raise ValueError(f"{n_cells - len(cells)} cells of {path} get NaN, which {dtype} does not have")
        self._n_cells = n_cells

    def finish(self, array: np.memmap, beside: Path) -> None:  # noqa: ARG002 - of the protocol
        import h5py

        order = None if self._cells is None else np.argsort(self._cells)
        n_rows, n_columns = array.shape
        step = max(1, _BLOCK // max(1, array.itemsize * n_columns))
        with h5py.File(self._path, "r+") as file:
            obsm = file.require_group("obsm")
            for name, value in (("encoding-type", "dict"), ("encoding-version", "0.1.0")):
                obsm.attrs.setdefault(name, value)
            # Without a name until it is whole: what reads the file after a crash sees no part of it.
            data = file.create_dataset(
                None,
                (self._n_cells, n_columns),
                array.dtype,
                fillvalue=np.nan if order is not None else None,
            )
            data.attrs["encoding-type"], data.attrs["encoding-version"] = "array", "0.2.0"
            for begin in range(0, n_rows, step):
                part = slice(begin, begin + step)
                if order is None or self._cells is None:
                    data[part] = array[part]
                else:
                    data[self._cells[order[part]]] = array[order[part]]
            if self._key in obsm:
                del obsm[self._key]
            obsm[self._key] = data


class _Modality:
    """A dense modality of an atlas."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: np.dtype,
        key: str,
        cells: Sequence[str] | np.ndarray | None,
        *,
        overwrite: bool,
    ) -> None:
        from hbx_gpu.atlas import RaggedAtlas

        if cells is None or len(cells) != shape[0]:
            raise ValueError(
                f"{path}: an atlas needs cells=, the uid of the cell of each of {shape[0]} rows, got "
                f"{None if cells is None else len(cells)}; take query.to_modality_obs(...)['uid']"
            )
        if dtype not in (np.float32, np.float16):
            raise ValueError(f"{path}: an atlas takes results of float32 or float16, got {dtype}")
        self._path, self._key, self._cells, self._overwrite = path, key, np.asarray(cells, object), overwrite
        # A wrong name is found before the model runs, not afterwards.
        atlas = RaggedAtlas.checkout_latest(path)
        for table in atlas.obs_tables:
            known = atlas.query(table).select(["uid"]).to_arrow().column("uid").to_numpy()
            if np.isin(self._cells, known).all():
                break
        else:
            raise ValueError(
                f"{path}: some of cells= are not in the latest snapshot of this atlas; they are the column "
                "uid of a query, query.to_modality_obs(...)['uid']"
            )
        self._table = table
        there = atlas.query(table)
        if key in atlas.pointer_fields and not overwrite and there.where(f"`{key}` IS NOT NULL").count():
            raise FileExistsError(f"{path} has {key!r} already; pass overwrite=True to replace it")

    def finish(self, array: np.memmap, beside: Path) -> None:  # noqa: ARG002 - of the protocol
        from hbx_gpu.atlas import RaggedAtlas

        atlas = RaggedAtlas.open(self._path)
        atlas.add_embedding(self._key, array, self._cells, obs_table=self._table, overwrite=self._overwrite)
        atlas.snapshot()


def _host(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    found = values.detach().cpu()
    if str(found.dtype) == "torch.bfloat16":  # which NumPy does not have
        found = found.float()
    return np.asarray(found)


def _rank() -> int:
    if not _process_group():
        return 0
    import torch.distributed as dist

    return int(dist.get_rank())


def _barrier() -> None:
    if _process_group():
        import torch.distributed as dist

        dist.barrier()


def _agree(failure: Exception | None) -> None:
    """Raise what happened on the first rank, on all of them."""
    if _process_group():
        import torch.distributed as dist

        told: list[str | None] = [None if failure is None else str(failure)]
        dist.broadcast_object_list(told)
        if failure is None and told[0] is not None:
            raise RuntimeError(f"the first rank could not write the results: {told[0]}")
    if failure is not None:
        raise failure


def _summed(times: np.ndarray) -> np.ndarray:
    """How often each row was written on all ranks together."""
    if not _process_group():
        return times
    import torch
    import torch.distributed as dist

    total = torch.from_numpy(times.astype(np.int32)).to(_collective_device())
    dist.all_reduce(total)
    return total.cpu().numpy()
