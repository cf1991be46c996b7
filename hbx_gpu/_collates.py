"""Batches to tensors: what a training loop receives. torch is imported by the calls, not by the module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypedDict, runtime_checkable

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu._datasets.stored import Kind
from hbx_gpu._float16 import overflow_said
from hbx_gpu._protocols import AnyCollate, Collate, CollateFunction, Collating, TensorBatch
from hbx_gpu._tensors import metadata_tensors
from hbx_gpu.batch import DenseBatch, MultimodalBatch, Part, RaggedBatch, SparseBatch, put_together
from hbx_gpu.transforms import Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hbx_gpu.images import TileCollate


class SpaceOptions(TypedDict):
    """What becomes of one sparse space."""

    layout: str
    dtype: str
    transform: Transform


@dataclass(frozen=True, slots=True)
class DenseCollate(Collating):
    """Sparse batches to dense tensors of any float dtype, counts transformed on the way.

    Attributes
    ----------
    dtype
        ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``. In float16, values of 65,520 and more
        become infinite; the log says so once.
    transform
        Steps from :mod:`hbx_gpu.transforms`, done in float32 before rounding to `dtype`.
    """

    dtype: str = "float32"
    transform: Transform | None = None

    def __call__(self, batch: SparseBatch) -> TensorBatch:
        """See :func:`sparse_to_dense_collate`."""
        import torch

        from hbx_gpu._engine.host.dense import densify

        x = torch.from_numpy(densify(batch, dtype=self.dtype, transform=self.transform, pool=POOL))
        if self.dtype == "bfloat16":  # NumPy has no such type: the bits came as uint16
            x = x.view(torch.bfloat16)
        return {"X": x, **metadata_tensors(batch.metadata)}

    def nbytes(self, n_rows: int, n_features: int, /) -> int:
        """Bytes of `X` for a batch of n_rows."""
        return n_rows * n_features * (2 if self.dtype.endswith("16") else int(self.dtype[-2:]) // 8)


def sparse_to_dense_collate(batch: SparseBatch | Sequence[SparseBatch]) -> TensorBatch:
    """A sparse batch as a dense tensor.

    Parameters
    ----------
    batch
        Rows of a sparse feature space, or a list of ``dataset[i]``, as torch collects rows of its
        ``ConcatDataset``. Columns that repeat within a row are summed.

    Returns
    -------
    dict
        ``X``: float32 CPU tensor (n_rows, n_features); counts above 2**24 lose precision. Beside it one
        entry per metadata column: a tensor for numeric columns and codes, else the NumPy array.

    Raises
    ------
    ValueError
        A metadata column is called ``X``.
    TypeError
        A list of rows from datasets with other features, layers, categories or columns.
    """
    return DenseCollate()(put_together(batch))


def sparse_to_csr_collate(batch: SparseBatch | Sequence[SparseBatch]) -> TensorBatch:
    """A sparse batch as a ``torch.sparse_csr_tensor``.

    Returns
    -------
    dict
        ``X``: float32 sparse CSR tensor (n_rows, n_features), int64 indices, ascending and unique within
        each row (repeated columns are summed), as torch requires. Metadata as in
        :func:`sparse_to_dense_collate`.

    Raises
    ------
    ValueError
        A metadata column is called ``X``, or a column number lies outside the matrix.
    """
    import torch

    from hbx_gpu._engine.host.canonical import as_float32, sort_rows

    batch = put_together(batch)
    pointers, columns = batch.offsets, batch.indices
    values = as_float32(batch.values, POOL.empty)
    if not batch.ascending:  # a batch that was not made for this: sorted in a copy of it
        low, high = batch.indices.min(initial=0), batch.indices.max(initial=-1)
        if low < 0 or high >= batch.n_features:
            raise ValueError(
                f"the batch has column {low if low < 0 else high}, outside [0, {batch.n_features})"
            )
        columns = POOL.empty(len(batch.indices), np.int64)
        columns[:] = batch.indices
        values = values.copy() if values is batch.values else values
        falling = np.ones(len(batch), bool)
        pointers, columns, (values,) = sort_rows(pointers, columns, [values], batch.n_features, falling)
    _hear_torch_out()
    tensor = torch.sparse_csr_tensor(
        torch.from_numpy(pointers),
        torch.from_numpy(columns),
        torch.from_numpy(values),
        size=(len(batch), batch.n_features),
        check_invariants=False,  # canonical by construction
    )
    return {"X": tensor, **metadata_tensors(batch.metadata)}


@cache
def _hear_torch_out() -> None:
    """torch announces once per process that CSR is in beta; every user of the collate knows.

    Filters are those of the whole process: changing them for every batch, on several threads, is neither
    cheap nor safe.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        torch.sparse_csr_tensor([0], [], [], size=(0, 0), check_invariants=False)


def dense_to_tensor_collate(
    batch: DenseBatch | RaggedBatch | Sequence[DenseBatch | RaggedBatch],
) -> TensorBatch:
    """A dense batch as a tensor of its own dtype, a ragged one as a list of tensors, without a copy.

    Returns
    -------
    dict
        ``X``: tensor (n_rows, n_features) or ``(n_rows, *per_cell_shape)``, or n_rows tensors. Metadata as in
        :func:`sparse_to_dense_collate`.

    Raises
    ------
    ValueError
        A metadata column is called ``X``.
    """
    import torch

    whole = put_together(batch)
    x = (
        [torch.from_numpy(array) for array in whole.data]
        if isinstance(whole, RaggedBatch)
        else torch.from_numpy(whole.data)
    )
    return {"X": x, **metadata_tensors(whole.metadata)}


@dataclass(frozen=True, slots=True)
class MultimodalCollate(Collating):
    """Multimodal batches to tensors, space by space.

    Attributes
    ----------
    layout
        Of sparse spaces: ``"dense"`` or ``"csr"``, one for all or by space (default: dense).
    dtype
        Of matrices, one for all or by space (default: float32); sparse tensors are float32. Tiles, boxes and
        bytes keep theirs.
    transform
        By space: steps from :mod:`hbx_gpu.transforms`, for sparse spaces made dense.
    images
        By space: what is done to its tiles or encoded images.
    tokens
        By space: what makes tokens of its counts.
    """

    layout: str | Mapping[str, str] = "dense"
    dtype: str | Mapping[str, str] = "float32"
    transform: Mapping[str, Transform] | None = None
    images: Mapping[str, TileCollate] | None = None
    tokens: Mapping[str, AnyCollate] | None = None

    def set_epoch(self, epoch: int) -> None:
        """What is drawn for tiles and tokens follows from seed, epoch and cell."""
        for drawing in (*(self.images or {}).values(), *(self.tokens or {}).values()):
            drawing.set_epoch(epoch)

    def options_of(self, name: str) -> SpaceOptions:
        """``layout``, ``dtype`` and ``transform`` of one sparse space."""
        transform = (self.transform or {}).get(name, Transform())
        layout = self._of(self.layout, name, "dense")
        return {"layout": layout, "dtype": self.dtype_of(name), "transform": transform}

    def dtype_of(self, name: str) -> str:
        """Of one sparse space; one dtype for all is for those that become dense."""
        if self._of(self.layout, name, "dense") == "csr" and isinstance(self.dtype, str):
            return "float32"
        return self._of(self.dtype, name, "float32")

    def collate_of(self, name: str, kind: Kind, *, present: np.ndarray | None = None) -> AnyCollate:
        """What makes tensors of one space; `present` by row number, for images."""
        if name in (self.tokens or {}):
            assert self.tokens is not None
            return self.tokens[name]
        if name in (self.images or {}):
            assert self.images is not None
            return ImagesCollate(self.images[name], present)
        if kind == "arrays":
            return LayersCollate(ArrayCollate())
        if kind == "matrix":
            return LayersCollate(MatrixCollate(self._of(self.dtype, name, "float32")))
        options = self.options_of(name)
        return LayersCollate(
            CsrCollate()
            if options["layout"] == "csr"
            else DenseCollate(options["dtype"], options["transform"])
        )

    @staticmethod
    def _of(setting: str | Mapping[str, str], name: str, default: str) -> str:
        return setting if isinstance(setting, str) else setting.get(name, default)

    def __call__(self, batch: MultimodalBatch) -> TensorBatch:
        """See :func:`multimodal_to_dense_collate`."""
        import torch

        check_spaces(batch.modalities)
        result: TensorBatch = {
            "present": {name: torch.from_numpy(mask) for name, mask in batch.present.items()},
            "measured": MeasuredTensors(batch.measured),
        }
        metadata = dict(batch.metadata or {})
        if "index" in metadata:
            result["index"] = torch.from_numpy(metadata.pop("index"))
        if metadata:
            result["metadata"] = metadata_tensors(metadata)
        for name, part in batch.modalities.items():
            if name in (self.images or {}) and not isinstance(part, SparseBatch):
                assert self.images is not None
                tiles = replace(part, metadata={"index": (batch.metadata or {})["index"]})
                result[name] = {"X": self.images[name](tiles, present=batch.present[name])["X"]}
            elif name in (self.tokens or {}):
                assert self.tokens is not None
                columns = batch.metadata or {}  # which recipes may read
                made = self.tokens[name](replace(part, metadata=columns))
                result[name] = {key: value for key, value in made.items() if key not in columns}
            else:
                collate: AnyCollate = self.collate_of(name, kind_of(part))
                result[name] = collate(part)
        return result

    def nbytes(self, n_rows: int, n_features: Mapping[str, int], /) -> int:
        """Bytes of the dense matrices of a batch of n_rows, dense spaces included."""
        sizes = [
            DenseCollate(options["dtype"]).nbytes(n_rows, width)
            for name, width in n_features.items()
            if (options := self.options_of(name))["layout"] == "dense"
        ]
        return sum(sizes)


def kind_of(batch: Part) -> Kind:
    """What rows of a batch are: sparse, rows of a dense matrix, or arrays without columns."""
    if isinstance(batch, SparseBatch):
        return "sparse"
    return "matrix" if isinstance(batch, DenseBatch) and batch.per_cell_shape is None else "arrays"


@dataclass(frozen=True, slots=True)
class MatrixCollate(Collating):
    """Rows of dense spaces to tensors of a float dtype.

    Attributes
    ----------
    dtype
        ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    """

    dtype: str = "float32"

    def __call__(self, batch: DenseBatch) -> TensorBatch:
        """See :class:`MatrixCollate`; metadata as in :func:`sparse_to_dense_collate`."""
        import torch

        name = "float32" if self.dtype == "bfloat16" else self.dtype  # which NumPy lacks
        data = batch.data
        if data.dtype != name:
            data = POOL.empty(batch.data.shape, name)
            with overflow_said(name):
                np.copyto(data, batch.data, casting="unsafe")
        x = torch.from_numpy(data).to(getattr(torch, self.dtype))
        return {"X": x, **metadata_tensors(batch.metadata)}


@dataclass(frozen=True, slots=True)
class CsrCollate(Collating):
    """Sparse batches to CSR tensors; see :func:`sparse_to_csr_collate`."""

    @property
    def sparse(self) -> bool:
        return True

    def __call__(self, batch: SparseBatch) -> TensorBatch:
        """See :func:`sparse_to_csr_collate`."""
        return sparse_to_csr_collate(batch)


@dataclass(frozen=True, slots=True)
class ArrayCollate(Collating):
    """Arrays to tensors of their own dtype; see :func:`dense_to_tensor_collate`."""

    def __call__(self, batch: DenseBatch | RaggedBatch) -> TensorBatch:
        """See :func:`dense_to_tensor_collate`."""
        return dense_to_tensor_collate(batch)


@dataclass(frozen=True, slots=True)
class FunctionCollate(Collating):
    """A function of the user's."""

    function: CollateFunction

    def __call__(self, batch: object) -> object:
        """What the function makes of the batch."""
        return self.function(batch)


@dataclass(frozen=True, slots=True)
class ImagesCollate(Collating):
    """Tiles of a dataset in which cells may lack them.

    Attributes
    ----------
    tiles
        What is done to them.
    present
        bool, by row number: which cells have one; None: all.
    """

    tiles: TileCollate
    present: np.ndarray | None = None

    @property
    def on_device(self) -> bool:
        """Whether its tensors are made on a GPU."""
        return self.tiles.on_device

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`MultimodalCollate.set_epoch`."""
        self.tiles.set_epoch(epoch)

    def __call__(self, batch: DenseBatch | RaggedBatch) -> TensorBatch:
        """See :class:`~hbx_gpu.images.TileCollate`."""
        rows = (batch.metadata or {}).get("index")
        return self.tiles(batch, present=None if self.present is None else self.present[rows])


@dataclass(frozen=True, slots=True)
class LayersCollate(Collating):
    """What `collate` makes of a batch, and where several layers were read ``layers`` by name, like ``X``."""

    collate: AnyCollate

    @property
    def sparse(self) -> bool:
        return self.collate.sparse

    @property
    def on_device(self) -> bool:
        return self.collate.on_device

    def __call__(self, batch: Part) -> TensorBatch:
        """See :class:`LayersCollate`."""
        made: TensorBatch = self.collate(batch)
        if batch.layers:
            first, *others = batch.layers
            layers = {name: self.collate(_layer(batch, name))["X"] for name in others}
            made["layers"] = {first: made["X"], **layers}
        return made

    def nbytes(self, n_rows: int, n_features: int, /) -> int:
        """Bytes of ``X``, as far as the collate can tell."""
        return self.collate.nbytes(n_rows, n_features)


def _layer(batch: Part, name: str) -> Part:
    """One layer of a batch, without metadata."""
    if isinstance(batch, SparseBatch):
        return replace(batch, values=batch.layers[name], metadata=None)
    if isinstance(batch, DenseBatch):
        return replace(batch, data=batch.layers[name], metadata=None)
    return replace(batch, data=batch.layers[name], metadata=None)


@runtime_checkable
class _Distinct(Protocol):
    """Masks that are made of a few distinct ones, as those of a multimodal batch."""

    def distinct(self, name: str, /) -> tuple[np.ndarray, np.ndarray]: ...


class MeasuredTensors(Mapping[str, "Tensor"]):
    """Masks of a batch as bool tensors (n_cells, n_features), each made when it is asked for.

    Parameters
    ----------
    measured
        Space -> bool array.
    device
        Where the tensors are; None: the CPU.
    """

    def __init__(self, measured: Mapping[str, np.ndarray], device: torch.device | None = None) -> None:
        self._measured, self._device = measured, device

    def __getitem__(self, name: str) -> Tensor:
        import torch

        if self._device is None or not isinstance(self._measured, _Distinct):
            return torch.from_numpy(self._measured[name])
        # Only the masks that occur cross to the device; there are as many as datasets in the batch.
        found = self._measured.distinct(name)
        masks, number = (torch.from_numpy(array).to(self._device) for array in found)
        return masks[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)


def multimodal_to_dense_collate(batch: MultimodalBatch | Sequence[MultimodalBatch]) -> TensorBatch:
    """A multimodal batch as dense tensors and presence masks; :class:`MultimodalCollate` can be told more.

    Returns
    -------
    dict
        ``batch[space]["X"]``: float32 tensor (n_cells, n_features); ``(n_cells, *per_cell_shape)`` in the
        stored dtype for tiles; a list of tensors where shapes differ. Where several layers were read,
        ``batch[space]["layers"][name]`` beside it.
        ``batch["present"][space]``: bool tensor (n_cells,).
        ``batch["measured"][space]``: bool tensor (n_cells, n_features), made when asked for.
        ``batch["metadata"][column]`` if metadata was requested.

    Raises
    ------
    ValueError
        A feature space has the name of another entry of the batch.
    """
    return MultimodalCollate()(put_together(batch))


def check_spaces(names: Iterable[str]) -> None:
    """Refuse fields whose names a multimodal batch has another meaning for.

    Raises
    ------
    ValueError
        Names the field.
    """
    for name in names:
        if name in ("present", "measured", "metadata", "index"):
            raise ValueError(f"a field called {name!r} would overwrite the batch's own entry of that name")


@cache
def register_with_torch() -> None:
    """Make torch's default collate know the batches of our datasets.

    ``DataLoader(dataset, batch_size=8)`` then gives what the plain collates make: dicts of dense tensors.
    torch documents its table of collates as the place to do so.
    """
    from torch.utils.data._utils.collate import default_collate_fn_map

    def whole(collate: CollateFunction) -> Callable[..., object]:
        def collated(batch: object, *, collate_fn_map: object = None) -> object:  # noqa: ARG001 - torch passes it
            return collate(batch)

        return collated

    default_collate_fn_map.update({
        SparseBatch: whole(sparse_to_dense_collate),
        DenseBatch: whole(dense_to_tensor_collate),
        RaggedBatch: whole(dense_to_tensor_collate),
        MultimodalBatch: whole(multimodal_to_dense_collate),
    })  # fmt: skip


def as_collate(collate: CollateFunction) -> AnyCollate:
    """What the user gave as `collate_fn`, as a :class:`~hbx_gpu._protocols.Collate`."""
    if isinstance(collate, Collate):
        return collate
    known: dict[CollateFunction, AnyCollate] = {
        sparse_to_dense_collate: DenseCollate(),
        sparse_to_csr_collate: CsrCollate(),
        dense_to_tensor_collate: ArrayCollate(),
        multimodal_to_dense_collate: MultimodalCollate(),
    }
    return known.get(collate) or FunctionCollate(collate)
