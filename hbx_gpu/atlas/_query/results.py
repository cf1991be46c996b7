"""Query results that are more than one matrix: fragments, arrays, several modalities at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._model.spaces import get_space, known_spaces
from hbx_gpu.atlas._query.encoders import plain
from hbx_gpu.atlas._query.fields import is_matrix
from hbx_gpu.atlas._query.matrices import obs_frame, to_pandas
from hbx_gpu.atlas._query.obs import ModalityRows, check_columns, read_table, some_rows
from hbx_gpu.batch import DenseBatch, RaggedBatch

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn
    from hbx_gpu.atlas._query.matrices import Matrices
    from hbx_gpu.atlas._query.selection import Selection
    from hbx_gpu.chromatin import Fragments

FRAGMENT_LAYERS = ("starts", "lengths")


@dataclass(frozen=True)
class Modality:
    """The rows of a selection in one modality; made by :meth:`of`.

    Attributes
    ----------
    selection, pointer
        The rows and the field.
    present
        bool, (n_rows,). True for rows that have the field.
    obs
        All rows, uid as index.
    found
        Places of the data, for the rows that have the field.
    """

    selection: Selection
    pointer: PointerColumn
    present: np.ndarray
    obs: pd.DataFrame
    found: ModalityRows

    @classmethod
    def of(cls, selection: Selection, pointer: PointerColumn, *, absent: bool = False) -> Modality:
        """Read the rows that have the field; all rows if `absent`."""
        found = selection.read_rows(pointer, [], absent=absent)
        present = found.rows.source >= 0
        names = [name for name in selection.plain_columns() if name != "uid"]
        rows = read_table(selection.table, ["uid", *names], rowids=found.rowids)
        return cls(selection, pointer, present, obs_frame(rows, names), some_rows(found, present))

    def open(self, layers: Sequence[str] | None = None) -> tuple[FeatureDataset, pd.DataFrame | None]:
        """A dataset over the rows that have the field, and the registry of its columns if there is one."""
        return self.selection.open(self.pointer, self.found, layers)

    def matrices(self) -> Matrices:
        """The rows that have the field as matrices."""
        return self.selection.matrices(self.pointer, self.found)


@dataclass(slots=True)
class MultimodalResult:
    """Several modalities of the same rows in memory.

    Attributes
    ----------
    obs
        All rows, uid as index.
    mod
        Field -> data of the rows that have it: AnnData for matrices, :class:`~hbx_gpu.chromatin.Fragments`,
        or a batch of arrays for images. Fields that no row has are left out.
    present
        Field -> bool, (n_rows,). True for rows that have the field.
    """

    obs: pd.DataFrame
    mod: dict[str, AnnData | Fragments | DenseBatch | RaggedBatch] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return len(self.obs)

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, name: str) -> AnnData | Fragments | DenseBatch | RaggedBatch:
        return self.mod[name]

    def __contains__(self, name: str) -> bool:
        return name in self.mod

    def __repr__(self) -> str:
        parts = [
            f"  {name}: {type(data).__name__}, {int(self.present[name].sum()):,} rows"
            for name, data in self.mod.items()
        ]
        return "\n".join([f"MultimodalResult of {self.n_rows:,} rows", *parts])

    def to_mudata(self) -> MuData:
        """The matrices as MuData; other modalities are left out, with a warning.

        Raises
        ------
        ImportError
            mudata is not installed.
        """
        try:
            from mudata import MuData
        except ImportError as error:
            raise ImportError(
                "to_mudata() needs mudata: pip install 'hbx_gpu[multimodal]', or use to_multimodal()"
            ) from error
        from anndata import AnnData

        matrices = {name: data for name, data in self.mod.items() if isinstance(data, AnnData)}
        if others := sorted(set(self.mod) - set(matrices)):
            warnings.warn(
                f"{others} hold no matrices and are not part of the MuData; to_multimodal() has them",
                stacklevel=3,
            )
        return MuData(matrices)


def read_multimodal(modalities: Iterable[Modality]) -> MultimodalResult:
    """Read modalities over the same rows.

    Raises
    ------
    ValueError
        There are none.
    """
    result: MultimodalResult | None = None
    for modality in modalities:
        result = result or MultimodalResult(modality.obs)
        if not modality.present.any():
            continue
        name = modality.pointer.name
        result.present[name] = modality.present
        result.mod[name] = _read(modality)
    if result is None:
        raise ValueError("the query considers no modality; feature_spaces() or select_fields() left none")
    return result


def _read(modality: Modality) -> object:
    pointer = modality.pointer
    if _is_fragments(pointer):
        return read_fragments(modality)
    if is_matrix(pointer.feature_space):
        matrices = modality.matrices()
        return matrices.cut(0, len(matrices))
    dataset, _ = modality.open()
    return dataset[:]


def read_fragments(modality: Modality) -> Fragments:
    """Read the fragments of the rows that have them.

    Raises
    ------
    TypeError
        A modality without fragments.
    """
    from hbx_gpu import chromatin
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu.chromatin._chromosomes import registered

    dataset, registry = modality.open(fragment_layers(modality.pointer))
    assert isinstance(dataset, CellDataset)  # fragments are sparse
    names, _ = registered(registry, list(dataset.feature_uids))
    return chromatin.read_fragments(dataset, modality.obs[modality.present], names)


def fragment_layers(pointer: PointerColumn, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the layers that make up fragments.

    Raises
    ------
    TypeError
        A modality without fragments.
    ValueError
        Other layers were requested.
    """
    if not _is_fragments(pointer):
        raise TypeError(
            f"field {pointer.name!r} ({pointer.feature_space!r}) holds no fragments; to_anndata() reads "
            "matrices, to_array() images and dense rows"
        )
    if asked is not None and tuple(asked) != FRAGMENT_LAYERS:
        raise ValueError(f"a matrix of fragments is made of {FRAGMENT_LAYERS}; leave layer out")
    return FRAGMENT_LAYERS


def _is_fragments(pointer: PointerColumn) -> bool:
    space = pointer.feature_space
    return space in known_spaces() and set(FRAGMENT_LAYERS) <= set(get_space(space).required_layers)


def grouped_count(selection: Selection, columns: list[str], rowids: np.ndarray | None) -> pd.DataFrame:
    """Number of cells of a selection for each combination of values of some obs columns, sorted by them."""
    check_columns(selection.schema, columns)
    partial = []
    for batch in selection.scan(columns, rowids):
        values = {name: plain(batch.column(name)) for name in columns}
        grouped = pa.table(values).group_by(columns).aggregate([([], "count_all")])
        partial.append(grouped.select([*columns, "count_all"]))
    if not partial:
        empty = read_table(selection.table, columns, rowids=np.empty(0, np.uint64))
        return empty.append_column("count", pa.array([], pa.int64())).to_pandas()
    total = pa.concat_tables(partial).group_by(columns).aggregate([("count_all", "sum")])
    total = total.select([*columns, "count_all_sum"]).rename_columns([*columns, "count"])
    return to_pandas(total.sort_by([(name, "ascending") for name in columns]))
