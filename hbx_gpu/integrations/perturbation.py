"""Sets of cells of one perturbation with matched controls, in batches with the keys of cell-load.

For State and models like it; cell-load itself is not needed. The sets are those of
:class:`~hbx_gpu.sampler.GroupedCellSampler`, from any store, with its rows in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from hbx_gpu._protocols import TensorBatch
from hbx_gpu.dataloader import make_loader
from hbx_gpu.sampler import GroupedCellSampler

if TYPE_CHECKING:
    import torch

    from hbx_gpu._loading.loader import CellLoader

    Tensor: TypeAlias = torch.Tensor

__all__ = ["CellLoadKeys", "perturbation_loader"]


class Labeled(Protocol):
    """A dataset of cells with categorical metadata columns."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Metadata of all rows, codes where `categories` has the name."""

    @property
    def categories(self) -> Mapping[str, np.ndarray]:
        """What the codes of a column mean, by column."""

    def __len__(self) -> int: ...


class CellLoadKeys:
    """Turns batches with controls into dicts with the keys of cell-load.

    Parameters
    ----------
    dataset
        Dataset with categorical metadata columns.
    perturbation, cell_type, batch
        Its columns of these. `batch` may be None.
    embeddings
        float32 (d,) of each perturbation by name, for ``pert_emb``. None: one-hot vectors.
    barcodes
        Name of each row, (n_rows,); None: batches have none.

    Raises
    ------
    ValueError
        A column is not categorical, an embedding is missing, or there are too few barcodes.
    """

    def __init__(
        self,
        dataset: Labeled,
        perturbation: str,
        cell_type: str,
        batch: str | None = None,
        *,
        embeddings: Mapping[str, Tensor] | None = None,
        barcodes: Sequence[str] | np.ndarray | None = None,
    ) -> None:
        import torch

        self._columns = (perturbation, cell_type, batch)
        self._names = {column: _categories(dataset, column) for column in self._columns if column is not None}
        names = self._names[perturbation].tolist()
        if embeddings is None:
            self._embeddings = torch.eye(len(names))
        else:
            if lacking := [name for name in names if name not in embeddings]:
                raise ValueError(
                    f"{len(lacking)} perturbations have no embedding, the first are {lacking[:5]}"
                )
            self._embeddings = torch.stack([torch.as_tensor(embeddings[name]).float() for name in names])
        self._barcodes = None if barcodes is None else np.asarray(barcodes, dtype=object)
        if self._barcodes is not None and len(self._barcodes) != len(dataset):
            raise ValueError(f"barcodes must have {len(dataset)} entries, got {len(self._barcodes)}")

    def __call__(self, batch: TensorBatch) -> TensorBatch:
        """Return the batch of cell-load.

        Parameters
        ----------
        batch
            With ``X`` (n, g), ``index``, codes of the columns, and the same of controls as ``control``.

        Returns
        -------
        dict
            ``pert_cell_emb`` and ``ctrl_cell_emb`` (n, g); ``pert_emb`` (n, d), ``cell_type_onehot`` (n, t)
            and ``batch`` (n, b), float32; ``pert_name``, ``cell_type`` and ``batch_name``, lists of strings;
            row numbers ``index`` and ``ctrl_index``; with barcodes also ``pert_cell_barcode`` and
            ``ctrl_cell_barcode``, and the former once more as ``barcodes``.
        """
        import torch

        perturbation, cell_type, batch_column = self._columns
        control, x = batch["control"], batch["X"]
        found = {
            "pert_cell_emb": x,
            "ctrl_cell_emb": control["X"],
            "pert_emb": self._embeddings[batch[perturbation].cpu()].to(x.device),
            "pert_name": self._names[perturbation][batch[perturbation].cpu().numpy()].tolist(),
            "cell_type": self._names[cell_type][batch[cell_type].cpu().numpy()].tolist(),
            "cell_type_onehot": _one_hot(batch[cell_type], len(self._names[cell_type])),
            "index": batch["index"],
            "ctrl_index": control["index"],
        }
        if batch_column is None:
            found["batch"] = torch.ones((len(x), 1), device=x.device)
            found["batch_name"] = [""] * len(x)
        else:
            found["batch"] = _one_hot(batch[batch_column], len(self._names[batch_column]))
            found["batch_name"] = self._names[batch_column][batch[batch_column].cpu().numpy()].tolist()
        if self._barcodes is not None:
            for name, rows in (("pert_cell_barcode", batch), ("ctrl_cell_barcode", control)):
                found[name] = self._barcodes[rows["index"].cpu().numpy()].tolist()
            found["barcodes"] = found["pert_cell_barcode"]
        return found


def perturbation_loader(
    dataset: Labeled,
    *,
    perturbation: str,
    control: str,
    cell_type: str,
    batch: str | None = None,
    set_size: int = 128,
    sets_per_batch: int = 1,
    sets_of: Sequence[str] | None = None,
    match: Sequence[str] | None = None,
    small_groups: str = "repeat",
    rows: np.ndarray | None = None,
    embeddings: Mapping[str, Tensor] | None = None,
    barcodes: Sequence[str] | np.ndarray | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    drop_last: bool = False,
    **options: Any,
) -> CellLoader:
    """Loader of sets of perturbed cells with matched controls, in the form of cell-load.

    Every perturbed cell comes in a set once per epoch. Order, position, ranks and resume are those of any
    loader of :func:`hbx_gpu.dataloader.make_loader`.

    Parameters
    ----------
    dataset
        Dataset of cells whose metadata columns include those named here.
    perturbation, control
        Column of the perturbation, and its value for control cells.
    cell_type, batch
        Columns of these; `batch` may be None.
    set_size, sets_per_batch
        Cells of a set, and sets of a batch.
    sets_of
        Columns that all cells of a set share; by default cell type and perturbation.
    match
        Columns that a control shares with its cell; by default cell type, and batch where it is given.
    small_groups
        What happens to a group with fewer than `set_size` cells: ``"repeat"`` fills its set with cells of its
        own, drawn again; ``"leave out"`` leaves them out.
    rows
        Row numbers to take cells and controls from, int or a boolean mask, for instance a split; None: all.
    embeddings, barcodes
        As for :class:`CellLoadKeys`.
    shuffle, seed, drop_last
        As for :class:`~hbx_gpu.sampler.GroupedCellSampler`.
    **options
        Passed on to :func:`hbx_gpu.dataloader.make_loader`; ``transform=log1p`` gives log counts.

    Returns
    -------
    CellLoader
        Its batches are described in :meth:`CellLoadKeys.__call__`; set i begins with row ``i * set_size``.

    Raises
    ------
    ValueError
        A column or value is unknown, or cells have no control to go with them.
    """
    if small_groups not in ("repeat", "leave out"):
        raise ValueError(f"small_groups must be 'repeat' or 'leave out', got {small_groups!r}")
    names = _categories(dataset, perturbation)
    if control not in names.tolist():
        raise ValueError(f"the column {perturbation!r} has no value {control!r}, only {names.tolist()[:10]}")
    codes = np.asarray(dataset.columns[perturbation])
    is_control = codes == names.tolist().index(control)
    used = np.ones(len(codes), bool)
    if rows is not None:
        used[:] = False
        used[rows] = True
    labels = [_codes(dataset, column) for column in sets_of or (cell_type, perturbation)]
    targets = used & ~is_control & np.logical_and.reduce([part >= 0 for part in labels])
    if small_groups == "leave out":
        targets &= _group_sizes(labels, targets) >= set_size
    # A control has no label: it makes no set of its own.
    labels = [np.where(targets, part, -1) for part in labels]
    matched = match or [column for column in (cell_type, batch) if column is not None]
    sampler = GroupedCellSampler(
        labels,
        controls=is_control & used,
        match=[_codes(dataset, column) for column in matched],
        set_size=set_size,
        sets_per_batch=sets_per_batch,
        paired=True,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )
    keys = CellLoadKeys(dataset, perturbation, cell_type, batch, embeddings=embeddings, barcodes=barcodes)
    return make_loader(dataset, sampler, **({"layout": "dense"} | options), convert=keys)


def _group_sizes(labels: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Number of targets with the labels of each row, int (n_rows,)."""
    table = np.stack([np.where(targets, part, -1) for part in labels])
    _, group, counts = np.unique(table, axis=1, return_inverse=True, return_counts=True)
    sizes: np.ndarray = counts[group.reshape(-1)]
    return sizes


def _codes(dataset: Labeled, column: str) -> np.ndarray:
    _categories(dataset, column)
    return np.asarray(dataset.columns[column])


def _categories(dataset: Labeled, column: str) -> np.ndarray:
    if column not in dataset.categories:
        raise ValueError(
            f"the dataset has no categorical column {column!r}, only {sorted(dataset.categories)}; name it "
            "when the dataset is made, with metadata_columns="
        )
    return np.asarray(dataset.categories[column], dtype=object)


def _one_hot(codes: Tensor, n: int) -> Tensor:
    import torch

    return torch.nn.functional.one_hot(codes.long(), n).float()
