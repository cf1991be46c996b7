"""Several modalities of the same cells as one dataset: files by name, an .h5mu file, objects in memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._advice import option, spelled
from hbx_gpu._h5ad.files import AnnDataGroup, H5adFile, check_anndata, is_anndata, without_copies
from hbx_gpu._h5ad.matrix import Matrix
from hbx_gpu._progress import Progress
from hbx_gpu._stores.kinds import is_mudata, split_modality
from hbx_gpu._stores.source import MuDataSource, open_mudata_source
from hbx_gpu.atlas._catalog.names import only_table
from hbx_gpu.atlas._catalog.session import Writable
from hbx_gpu.atlas._ingest.anndata import (
    backing_file,
    check_layer,
    check_matrix_space,
    field_of,
    first_layer,
    storage_of,
)
from hbx_gpu.atlas._ingest.cells import Dataset
from hbx_gpu.atlas._ingest.commit import IngestReport, ingest
from hbx_gpu.atlas._ingest.fragments import FragmentsInput, FragmentsPart
from hbx_gpu.atlas._ingest.identity import GivenColumn, identify
from hbx_gpu.atlas._ingest.images import ImageInput, image_part
from hbx_gpu.atlas._ingest.inputs import Input, choose_for, from_anndata, from_h5ad, hash_file, matrices_of
from hbx_gpu.atlas._ingest.joining import CellIds, Join, check_join, join_cells
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.parts import MatrixPart, Part
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._model.spaces import FeatureSpace, get_space, known_spaces
from hbx_gpu.errors import AtlasError, InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas._catalog.catalog import Catalog

_log = logging.getLogger(__name__)

_ALIASES = {
    "gene_expression": ("rna", "gex", "gene", "genes"),
    "protein_abundance": ("protein", "proteins", "prot", "adt", "antibody", "antibody_capture"),
    "image_features": ("morphology",),
    "chromatin_accessibility": ("atac", "chromatin", "fragments"),
    "chromatin_peaks": ("peaks",),
    "image_tiles": ("tiles",),
    "discrete_image": ("images", "image"),
    "encoded_images": ("encoded",),
}
SHORT_NAMES = {alias: space for space, aliases in _ALIASES.items() for alias in aliases}
"""Usual names of modalities -> feature space."""

Layers = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class _Options:
    """Arguments that several modalities share."""

    layers: Layers
    feature_id_column: GivenColumn | Mapping[str, GivenColumn]
    allow_rounding: bool
    strip_versions: bool
    require_shared_genes: float | None
    catalog: Catalog
    stack: contextlib.ExitStack

    def layers_of(self, name: str, space: FeatureSpace) -> dict[str, str]:
        """Layer to write -> matrix to read."""
        given = self.layers.get(name)
        if not given:
            return {first_layer(space): "X"}
        for layer in given:
            check_layer(space, layer)
        return {layer: matrix.removeprefix("layers/") for layer, matrix in given.items()}

    def id_column_of(self, name: str) -> GivenColumn:
        """How the features of a modality are identified."""
        given = self.feature_id_column
        return given.get(name) if isinstance(given, Mapping) else given


def add_multimodal(
    atlas: Writable,
    modalities: Any,
    *,
    join: Join = "outer",
    obs_from: str | None = None,
    layers: Layers | None = None,
    feature_id_column: GivenColumn | Mapping[str, GivenColumn] = None,
    dataset_uid: str | None = None,
    obs_table: str | None = None,
    chunk_shape: int | tuple[int, ...] | None = None,
    shard_shape: int | tuple[int, ...] | None = None,
    codec: str | None = None,
    allow_rounding: bool = False,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    obs_types: Mapping[str, str] | None = None,
    drop_obs: Sequence[str] = (),
    rename_obs: Mapping[str, str] | None = None,
    replace: bool = False,
    accept_duplicates: bool = False,
    exist_ok: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Add several modalities of the same cells as one dataset, or nothing at all.

    Files are joined by cell id, the names in obs: one row per cell with a pointer per modality, null where
    the cell lacks it. Matrices are read in pieces, so memory does not grow with them.

    Parameters
    ----------
    atlas
        Open for writing.
    modalities
        Name -> data, or a MuData object or the path of one (.h5mu or zarr) with all its modalities. A name is
        a pointer column, a feature space, or a usual short name (``rna``, ``protein``, ``atac``, ``tiles``,
        ...); the pointer column is added where the obs table has none of that space. Data are an AnnData,
        the path of an .h5ad file, ``"file.h5mu:modality"``, an :class:`ImageInput`, or a fragments file by
        its path or as :class:`FragmentsInput`.
    join
        ``outer``: a cell that any matrix has is kept, its other modalities absent. ``inner``: cells of all
        modalities. ``exact``: ids without a partner are an error. A table of images must name cells of the
        matrices, and barcodes of fragments from other cells are left out, whatever the join.
    obs_from
        Modality whose obs columns count. Otherwise a column that several modalities have must hold the same
        values in all, where it holds any.
    layers
        Modality -> {layer to write: matrix to read}: ``{"protein": {"counts": "X", "dsb_normalized":
        "dsb"}}``. By default ``X`` goes to the layer that the space requires; where those are counts and
        ``X`` holds none, ``raw`` or a layer called ``counts``.
    feature_id_column
        Column of var with the durable feature ids, for all modalities or by modality; see
        :func:`add_from_anndata`.
    dataset_uid
        By default it follows from the content.
    obs_table
        Where the cells go; needed where there are several.
    chunk_shape, shard_shape
        Values per inner chunk (40,960) and per shard (41,943,040); dense arrays fit whole rows into them.
    codec
        How arrays are compressed, by default as the atlas was made with. ``hbx_gpu.rowpack`` and
        ``homeobox.bitpacking`` are for sparse matrices: dense arrays and images then use zstd.
    allow_rounding
        Let float layers take values that float32 does not hold exactly.
    strip_versions, require_shared_genes
        As of :func:`add_from_anndata`, for every matrix.
    obs_types, drop_obs, rename_obs
        Obs columns that get another type (name -> ``int``, ``float``, ``bool``, ``str``, ``datetime``), that
        are left out, or that get another name (name in the file -> name). docs/columns.md says how columns
        of several files are joined without these.
    replace
        Let the data take the place of the dataset made of the same file, of a file of that name, or of the
        same cells. Snapshots that were taken before keep what they had.
    accept_duplicates
        Add cells that are in the atlas already, from another file; by default most names and values of cells
        alike are an error.
    exist_ok
        Report 0 cells if the same data were ingested in the same way before.
    progress
        Called with the number of cells done and of all cells, added up over the modalities.

    Returns
    -------
    IngestReport
        How many cells there are now, by modality, and how many ids were left out.

    Raises
    ------
    InvalidDataError
        Ids are missing, repeated or without a partner; obs columns differ; values break a rule of their
        layer; a table names tiles or boxes that its image does not have.
    UnknownNameError
        A modality, layer, table or feature space that does not exist.
    AlreadyIngestedError
        The same data, or some of them, are in the atlas.
    AtlasError, AtlasLockedError
        The obs table has a class without such a column; somebody else is writing.
    """
    session = atlas.session
    check_join(join)
    table = obs_table or only_table(session.obs_tables)
    storage = storage_of(session, codec, chunk_shape, shard_shape)
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.writing())
        opened, common, source = _open_all(modalities, stack, allow_links=session.catalog.allow_links)
        _check_names(opened, layers or {}, feature_id_column, obs_from)
        fields = session.catalog.pointer_spaces(table)
        targets = {name: resolve_modality(name, fields, table, data) for name, data in opened.items()}
        _check_targets(targets)
        options = _Options(
            layers or {},
            feature_id_column,
            allow_rounding,
            strip_versions,
            require_shared_genes,
            session.catalog,
            stack,
        )
        parts = [_part(name, *targets[name], data, options) for name, data in opened.items()]
        joined = join_cells([CellIds(p.name, p.source, p.ids, p.role) for p in parts], join)
        choices: dict[str, str] = {"modality_join": join} if len(parts) > 1 else {}
        if len(parts) > 1 and obs_from is not None:
            choices["obs_from"] = obs_from
        settings = Settings(
            table,
            storage,
            codec is not None,
            dataset_uid=dataset_uid,
            choices=choices,
            obs_from=obs_from,
            edits=ObsEdits(obs_types or {}, drop_obs, rename_obs or {}),
            exist_ok=exist_ok,
            replace=replace,
            accept_duplicates=accept_duplicates,
            progress=progress,
        )
        shared = [(name, frame, _rows_of(frame, joined.ids, name)) for name, frame in common]
        return ingest(session, Dataset(parts, joined, source, shared), settings)


# Names


def resolve_modality(
    name: str, fields: Mapping[str, str], table: str, data: object = None
) -> tuple[str, FeatureSpace]:
    """Pointer column and feature space that a modality is meant for.

    Parameters
    ----------
    name
        A pointer column, a feature space, or one of :data:`SHORT_NAMES`.
    fields
        Pointer columns of the obs table -> feature space. Where none is of the space, the column is named
        after it.
    table
        The obs table, for messages.
    data
        What it is: a matrix of an ``atac`` modality is one of peaks, anything else fragments.

    Raises
    ------
    UnknownNameError
        It is none of these, or several columns are of that space.
    """
    if name in fields:
        return name, get_space(fields[name])
    space = SHORT_NAMES.get(name.lower(), name.lower())
    if space == "chromatin_accessibility" and _is_matrix(data):
        space = "chromatin_peaks"  # counted already: cells x peaks
    if space not in known_spaces():
        other = spelled("{name: 'file.h5mu:modality'}", "--modality NAME=FILE.h5mu:MODALITY")
        raise UnknownNameError(
            f"unknown modality {name!r}; name it by a pointer column ({sorted(fields)}), a feature space "
            f"({known_spaces()}) or a short name ({sorted(SHORT_NAMES)}); a space of your own is made known "
            "with hbx_gpu.atlas.register_space(hbx_gpu.atlas.FeatureSpace(...)). A modality of another name "
            f"in an .h5mu file is taken with {other}"
        )
    if space not in fields.values():
        return space, get_space(space)
    return field_of(space, fields, table), get_space(space)


def _check_targets(targets: Mapping[str, tuple[str, FeatureSpace]]) -> None:
    seen: dict[str, str] = {}
    for name, (field_name, space) in targets.items():
        if field_name in seen:
            raise AtlasError(
                f"modalities {seen[field_name]!r} and {name!r} both mean pointer column {field_name!r}; add "
                f"another one with RaggedAtlas.add_pointer_field(name, {space.name!r}) and use its name"
            )
        seen[field_name] = name


def _check_names(
    opened: Mapping[str, object], layers: Layers, id_column: object, obs_from: str | None
) -> None:
    """Options that name a modality must name one that is there."""
    named = {
        option("layers", spelled("...", "NAME:LAYER=MATRIX")): list(layers),
        option("obs_from"): [obs_from] if obs_from else [],
        option("feature_id_column"): list(id_column) if isinstance(id_column, Mapping) else [],
    }
    for where, names in named.items():
        if unknown := [name for name in names if name not in opened]:
            raise UnknownNameError(f"{where} names {unknown}, but the modalities are {list(opened)}")


def _is_matrix(data: object) -> bool:
    """Whether data are a matrix of cells and features, or a path that says so."""
    if isinstance(data, str | os.PathLike):
        path = os.fspath(data)
        return path.endswith(".h5ad") or bool(split_modality(path)[1])
    return isinstance(data, AnnDataGroup | _Backed | Input) or is_anndata(data)


# Data


def modalities_with_matrix(file: MuDataSource) -> list[str]:
    """Modalities of a MuData that hold a matrix, not only tables as those of receptors do.

    Raises
    ------
    InvalidDataError
        There is none.
    """
    found = []
    for name in file.modalities():
        data = file.modality(name)
        if any(len(data.var(matrix)) for matrix in data.matrices()):  # scirpy writes X of no columns
            found.append(name)
    _check_some(str(file.path), found)
    return found


def _say_left_out(source: str, found: Collection[str], names: Iterable[str]) -> None:
    if left_out := [name for name in names if name not in found]:
        _log.warning("warning: %s: %s holds no matrix and is left out", source, ", ".join(left_out))
    _check_some(source, found)


def _check_some(source: str, found: Collection[str]) -> None:
    if not found:
        raise InvalidDataError(f"{source} has no modality with a matrix: nothing to ingest")


def _open_all(
    modalities: object, stack: contextlib.ExitStack, *, allow_links: bool
) -> tuple[dict[str, object], list[tuple[str, pd.DataFrame]], str]:
    """Modality -> its data, opened; tables of obs that belong to none; and what to call the whole."""
    if isinstance(modalities, str | os.PathLike):
        file = stack.enter_context(open_mudata_source(modalities, allow_links=allow_links))
        found: dict[str, object] = {name: file.modality(name) for name in modalities_with_matrix(file)}
        _say_left_out(str(file.path), found, file.modalities())
        return found, [(str(file.path), file.obs())], str(file.path)
    if hasattr(modalities, "mod") and hasattr(modalities, "obs"):  # a MuData; mudata is optional
        if getattr(modalities, "axis", 0) == 1:
            raise InvalidDataError(
                "the parts of this MuData share features, not cells (axis=1), so they are datasets and no "
                "modalities; add them one by one with add_from_anndata"
            )
        mods = {name: adata for name, adata in modalities.mod.items() if matrices_of(adata) and adata.n_vars}
        _say_left_out("MuData object", mods, modalities.mod)
        obs = without_copies(modalities.obs, {name: adata.obs.columns for name, adata in mods.items()})
        return mods, [("MuData object", obs)], "MuData object"
    if not isinstance(modalities, Mapping) or not modalities:
        raise TypeError(
            "expected {modality: data}, a MuData object or the path of an .h5mu file, got "
            f"{type(modalities).__name__}"
        )
    files: dict[Path, MuDataSource] = {}
    opened = {name: _open_one(data, stack, files, allow_links) for name, data in modalities.items()}
    named = [f"{name}={_name_of(data)}" for name, data in modalities.items()]
    return opened, [(str(file.path), file.obs()) for file in files.values()], ", ".join(named)


@dataclass(frozen=True)
class _Backed:
    """An AnnData that is backed by a file, and the file."""

    file: H5adFile
    adata: AnnData

    @property
    def source(self) -> str:
        return self.file.source


def _name_of(data: object) -> str:
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if isinstance(data, AnnDataGroup | _Backed | Input):
        return data.source
    return os.fspath(data.path) if isinstance(data, FragmentsInput) else type(data).__name__


def _open_one(
    data: object, stack: contextlib.ExitStack, files: dict[Path, MuDataSource], allow_links: bool
) -> object:
    if not isinstance(data, str | os.PathLike):
        if is_anndata(data) and data.isbacked:
            return _Backed(stack.enter_context(H5adFile(backing_file(data))), data)
        return data
    path = os.fspath(data)
    mudata, modality = split_modality(path)
    if modality:
        if mudata not in files:
            files[mudata] = stack.enter_context(open_mudata_source(mudata, allow_links=allow_links))
        return files[mudata].modality(modality)
    if is_mudata(Path(path)):
        with open_mudata_source(path, allow_links=allow_links) as file:
            raise InvalidDataError(
                f"{path} holds several modalities, {file.modalities()}; name one as {path}:MODALITY, or "
                "ingest the file as a whole"
            )
    # What is in it follows from the feature space.
    return Path(path)


def _part(name: str, field_name: str, space: FeatureSpace, data: object, options: _Options) -> Part:
    if space.repeats:
        given = data if isinstance(data, FragmentsInput) else None
        if given is None and isinstance(data, Path) and data.suffix != ".h5ad":
            given = FragmentsInput(data)
        if given is None:
            raise InvalidDataError(
                f"modality {name!r}: feature space {space.name!r} holds fragments (chromosome, start, end, "
                f"barcode), not a cells x features matrix such as {_name_of(data)}; give a "
                "fragments file instead, or name the modality 'peaks', which takes such a matrix"
            )
        return FragmentsPart(name, field_name, space, given)
    if not space.has_features:
        if not isinstance(data, ImageInput):
            raise InvalidDataError(
                f"modality {name!r}: images of feature space {space.name!r} need a table that maps cells "
                f"to them: {spelled('ImageInput(image, table)', '--tiles-table TABLE')}"
            )
        return image_part(name, field_name, space, data, allow_links=options.catalog.allow_links)
    check_matrix_space(field_name, space)
    if isinstance(data, Path):
        data = options.stack.enter_context(H5adFile(data, allow_links=options.catalog.allow_links))
    return _matrix_part(name, field_name, space, data, options)


def _matrix_part(name: str, field_name: str, space: FeatureSpace, data: Any, options: _Options) -> MatrixPart:
    backed: AnnData | None = None
    if isinstance(data, _Backed):
        data, backed = data.file, data.adata
    if not isinstance(data, Input | AnnDataGroup):
        check_anndata(data)
    wanted = options.layers_of(name, space)
    if not options.layers.get(name) and not isinstance(data, Input):
        target = first_layer(space)
        if chosen := choose_for(data, None, counts=target == "counts"):
            wanted = {target: chosen.name}
    inputs = _read_layers(data, name, list(wanted.values()), backed)
    first = inputs[0]
    for layer, other in zip(wanted, inputs, strict=True):
        if list(other.var.index) != list(first.var.index):
            raise InvalidDataError(
                f"{first.source}: matrices {first.matrix_name!r} and {other.matrix_name!r} have different "
                f"features, so layer {layer!r} cannot lie beside {next(iter(wanted))!r}; ingest one of them"
            )
    matrices: dict[str, Matrix] = {layer: found.matrix for layer, found in zip(wanted, inputs, strict=True)}
    choice, ids = identify(
        options.catalog,
        space.name,
        first.var,
        first.source,
        options.id_column_of(name),
        strip_versions=options.strip_versions,
        require_shared=options.require_shared_genes,
    )
    return MatrixPart(
        name,
        field_name,
        space,
        first,
        matrices,
        [found.matrix_name for found in inputs],
        choice,
        ids,
        options.allow_rounding,
        one_of_several=True,
    )


def _read_layers(
    data: object, name: str, wanted: Sequence[str], backed: AnnData | None = None
) -> list[Input]:
    """One input per matrix; the first identifies them all."""
    if isinstance(data, Input):
        if list(wanted) != ["X"]:
            raise InvalidDataError(f"modality {name!r}: this input is one matrix, not {list(wanted)}")
        return [data]
    if isinstance(data, AnnDataGroup):
        sha256 = hash_file(data.path)
        return [from_h5ad(data, matrix, sha256=sha256, backed=backed) for matrix in wanted]
    if not is_anndata(data):
        raise InvalidDataError(
            f"modality {name!r}: expected an AnnData or the path of an .h5ad file, got {type(data).__name__}"
        )
    inputs = [from_anndata(data, matrix, source=f"AnnData object {name!r}") for matrix in wanted]
    if len(inputs) > 1:
        together = hashlib.sha256("".join(found.sha256 for found in inputs).encode()).hexdigest()
        inputs[0] = Input(**vars(inputs[0]) | {"sha256": together})
    return inputs


def _rows_of(frame: pd.DataFrame, ids: Sequence[str], source: str) -> np.ndarray:
    """Per cell the row of a common table, -1 where it has none."""
    if not frame.index.is_unique:
        twice = frame.index[frame.index.duplicated()].unique()[:5].tolist()
        raise InvalidDataError(f"{source}: cell ids occur more than once in obs, for example {twice}")
    result: np.ndarray = frame.index.astype(str).get_indexer(list(ids)).astype(np.int64)
    return result
