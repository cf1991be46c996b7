"""`MultimodalCellDataset`: several feature spaces of the same cells, read under one plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hbx_gpu._datasets.base import Dataset
from hbx_gpu._datasets.stored import Planned
from hbx_gpu._devices import cores
from hbx_gpu._protocols import Rows
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.readers import Slab
from hbx_gpu.batch import MultimodalBatch, Part
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._datasets.modality import Modality
    from hbx_gpu._storage.readers import Reader


_SIDE_BY_SIDE = 128  # rows; smaller batches are decoded before other threads could begin


class MultimodalCellDataset(Dataset[MultimodalBatch]):
    """Several feature spaces of the same cells; every modality has a row for every cell.

    The chunks that a batch needs of all spaces are looked up and read in one go, and each space is then
    decoded by its own engine.

    Parameters
    ----------
    datasets
        One dataset per field over the same rows, absent ones included (their source is -1). Metadata is
        taken from the first.

    Attributes
    ----------
    n_cells
        Number of rows of the query, whichever modalities they have.
    n_features
        Number of columns of each field.
    groups_np
        int32, (n_cells,). Number of the stored matrix of every row in the first field; rows that lack this
        field form one more group.
    feature_uids
        uids of the columns of each field.
    categories, columns
        Metadata, as in :class:`CellDataset`.

    Raises
    ------
    ValueError
        There are no fields, or fields have different rows.
    """

    def __init__(self, datasets: Mapping[str, Modality], *, reader: str | None = None) -> None:
        if not datasets:
            raise ValueError("a multimodal dataset needs at least one feature space")
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all fields must number the same rows, got {sizes}")
        first, *others = datasets
        self.datasets: dict[str, Modality] = {
            first: datasets[first],
            **{name: datasets[name].without_metadata() for name in others},
        }
        self._reader_kind = reader or self._first.reader_kind
        self._open()

    def _open(self) -> None:
        directories = [dataset.directory for dataset in self.datasets.values()]
        self._directory = ChunkDirectory([layout for d in directories for layout in d.layouts])
        self._base = np.cumsum([0, *(int(d.base[-1]) for d in directories)])
        self._reader: Reader = open_reader(self._reader_kind, self._directory)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def _first(self) -> Modality:
        return next(iter(self.datasets.values()))

    @property
    def n_features(self) -> dict[str, int]:
        return {name: dataset.n_features for name, dataset in self.datasets.items()}

    @property
    def feature_uids(self) -> dict[str, np.ndarray]:
        return {name: dataset.feature_uids for name, dataset in self.datasets.items()}

    @property
    def groups_np(self) -> np.ndarray:
        groups = self._first.groups_np
        return np.where(groups < 0, self._first.n_groups, groups).astype(np.int32)

    @property
    def present(self) -> dict[str, np.ndarray]:
        """bool, (n_cells,) per field. Which cells have the modality."""
        return {name: dataset.present for name, dataset in self.datasets.items()}

    @property
    def categories(self) -> dict[str, np.ndarray]:
        return self._first.categories

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self._first.columns

    @property
    def reader_kind(self) -> str:
        """``"mmap"`` or ``"preadv"``: how compressed bytes are read."""
        return self._reader_kind

    @property
    def directory(self) -> ChunkDirectory:
        """Where the chunks of all fields lie."""
        return self._directory

    def __len__(self) -> int:
        return len(self._first)

    def __repr__(self) -> str:
        spaces = ", ".join(f"{name} ({dataset.n_features:,})" for name, dataset in self.datasets.items())
        return f"MultimodalCellDataset({self.n_cells:,} cells: {spaces})"

    def __getitems__(self, rows: Rows) -> MultimodalBatch:
        """One batch of `rows`, in the order asked; the spaces of a large one are decoded side by side.

        Raises
        ------
        IndexError
            A row number is outside ``[-n_cells, n_cells)``.
        CorruptChunkError
            A chunk that holds one of the rows cannot be decoded.
        """
        if len(rows) < _SIDE_BY_SIDE:
            return super().__getitems__(rows)
        if self._pool is None:
            threads = min(len(self.datasets), cores())
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hbx_gpu-multimodal")
        return self._read(self.checked([rows]), self._pool.map)[0]

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[MultimodalBatch]:
        """See :meth:`Dataset.read_rows`; on the calling thread."""
        return self._read(selections, map)

    def _read(
        self, selections: Sequence[np.ndarray], apply: Callable[..., Iterator[Sequence[Part]]]
    ) -> list[MultimodalBatch]:
        selection = np.concatenate([*selections, np.empty(0, np.int64)])
        plans, slabs = self.read(selection)
        parts = list(self.datasets.values())
        decoded = list(
            apply(lambda part, plan, slab: part.decode(plan, slab, selections), parts, plans, slabs)
        )
        return [
            self._batch(rows, dict(zip(self.datasets, batch, strict=True)))
            for rows, batch in zip(selections, zip(*decoded, strict=True), strict=True)
        ]

    def _batch(self, rows: np.ndarray, modalities: dict[str, Part]) -> MultimodalBatch:
        metadata = next(iter(modalities.values())).metadata
        for part in modalities.values():
            part.metadata = None
        return MultimodalBatch(
            modalities=modalities,
            present={name: part.groups_of(rows) >= 0 for name, part in self.datasets.items()},
            metadata=metadata,
            n_cells=len(rows),
            measured=self.measured(rows),
        )

    def marked(self, batch: MultimodalBatch) -> MultimodalBatch:
        """See :meth:`Dataset.marked`."""
        axes = {name: part.axes() for name, part in self.datasets.items()}
        parts: dict[str, Part] = {
            name: replace(part, axes=axes[name]) for name, part in batch.modalities.items()
        }
        return replace(batch, modalities=parts, axes=repr(axes))

    def read(self, selection: np.ndarray, reader: Reader | None = None) -> tuple[list[Planned], list[Slab]]:
        """Plan the rows `selection` for each field, and read the stored bytes of the chunks it needs."""
        with stage("plan"):
            plans = [part.plan(selection) for part in self.datasets.values()]
            ends = np.cumsum([0, *(len(plan.chunks) for plan in plans)])
            chunks = [plan.chunks + base for plan, base in zip(plans, self._base, strict=False)]
            extents: Extents = self._directory.extents(np.concatenate(chunks))
            cuts = [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
            stored = np.array([np.maximum(extents.nbytes[cut], 0).sum() for cut in cuts])
            share = stored @ np.array([plan.share for plan in plans]) / max(1, stored.sum())
            extents = replace(extents, share=float(share))
        with stage("read") as reading:
            slab = (reader or self._reader).read(extents)
            reading.nbytes = int(slab.nbytes[slab.nbytes > 0].sum())
        slabs = [Slab(slab.address[cut], slab.nbytes[cut], slab, slab.copy) for cut in cuts]
        return plans, slabs

    def needed_chunks(self) -> np.ndarray:
        """See :meth:`CellDataset.needed_chunks`."""
        parts = zip(self.datasets.values(), self._base, strict=False)
        return np.concatenate([part.needed_chunks() + base for part, base in parts])

    def measured(self, rows: np.ndarray) -> Measured:
        """Which features the datasets of these cells have, per field with features."""
        return Measured(
            {
                name: (part.groups_of(rows), part.measured_masks)
                for name, part in self.datasets.items()
                if part.kind != "arrays"
            }
        )

    def subset(self, rows: Rows) -> MultimodalCellDataset:
        """The dataset of some rows; see :meth:`CellDataset.subset`."""
        chosen = self.row_numbers(rows)
        parts = {name: part.subset(chosen) for name, part in self.datasets.items()}
        return MultimodalCellDataset(parts, reader=self._reader_kind)

    def identity(self) -> dict[str, object]:
        """Which rows these are; see :meth:`CellDataset.identity`."""
        parts = {name: part.identity() for name, part in self.datasets.items()}
        first = next(iter(parts.values()))
        rows = hashlib.blake2b(
            repr([(name, part["rows"]) for name, part in parts.items()]).encode(), digest_size=8
        )
        return first | {"rows": rows.hexdigest()}

    def with_row_numbers(self) -> Self:
        """See :meth:`Dataset.with_row_numbers`."""
        first, *others = self.datasets
        numbered = {first: self.datasets[first].with_row_numbers()}
        return self._over(numbered | {name: self.datasets[name] for name in others})

    def with_wide_columns(self, names: Iterable[str] | None = None) -> Self:
        """This dataset with :meth:`CellDataset.with_wide_columns` for the fields `names`; None: for all."""
        wide = set(self.datasets if names is None else names)
        parts = self.datasets.items()
        return self._over({name: part.with_wide_columns() if name in wide else part for name, part in parts})

    def reading_with(self, reader: Reader) -> Self:
        """This dataset with another reader of its chunks; everything else is shared."""
        return self._derived(_reader=reader, _pool=None)

    def _over(self, datasets: Mapping[str, Modality]) -> Self:
        """This dataset with other variants of its parts."""
        return self._derived(datasets=dict(datasets), _pool=None)

    def open_reader(self, kind: str) -> Reader:
        """A reader of the chunks of all fields; see :meth:`CellDataset.open_reader`."""
        return open_reader(kind, self._directory)

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :meth:`Dataset.rows_nbytes`; masks aside."""
        parts = [part.rows_nbytes(selections) for part in self.datasets.values()]
        return [sum(sizes) for sizes in zip(*parts, strict=True)]

    def close(self) -> None:
        """Close the files; the dataset opens them again when it is read again."""
        self._reader.close()
        for part in self.datasets.values():
            part.close()

    def __getstate__(self) -> dict[str, object]:
        return {"datasets": self.datasets, "reader": self._reader_kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.datasets = state["datasets"]
        self._reader_kind = state["reader"]
        self._open()


class Measured(Mapping[str, np.ndarray]):
    """Field -> bool, (n_cells, n_features): which features each cell's dataset has.

    Made when asked for: whole masks are as large as dense batches.

    Parameters
    ----------
    parts
        For each field the group of every cell, and the function that returns the masks of groups.
    """

    def __init__(self, parts: Mapping[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]) -> None:
        self._parts = dict(parts)

    def distinct(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The masks that occur, bool (n_masks, n_features), and the number of each cell's mask, int64."""
        groups, masks = self._parts[name]
        found, number = np.unique(groups, return_inverse=True)
        return masks(found), number

    def __getitem__(self, name: str) -> np.ndarray:
        masks, number = self.distinct(name)
        result: np.ndarray = masks[number]
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __reduce__(self) -> tuple[object, ...]:
        # A pickle holds the masks that occur, not the dataset.
        return _restored, ({name: self.distinct(name) for name in self},)


def _restored(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> Measured:
    return Measured({name: (number, masks.__getitem__) for name, (masks, number) in parts.items()})
