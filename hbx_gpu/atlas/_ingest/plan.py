"""What is chosen for several files together before the first one is added: matrices, ids, obs columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hbx_gpu._h5ad.files import AnnDataGroup, H5muFile
from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu._stores.source import open_source
from hbx_gpu.atlas._catalog.names import only_table
from hbx_gpu.atlas._catalog.session import Writable
from hbx_gpu.atlas._ingest.anndata import field_of, first_layer
from hbx_gpu.atlas._ingest.identity import choose_together
from hbx_gpu.atlas._ingest.inputs import choose_for
from hbx_gpu.atlas._ingest.multimodal import Layers, modalities_with_matrix, resolve_modality
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.errors import HbxError, InvalidDataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilePlan:
    """What was chosen for one file, or for one modality of it.

    Attributes
    ----------
    layer
        Matrix to read.
    matrix
        The same in words, with what it holds where that was looked at.
    choice
        How its features are identified.
    edits
        What is changed about its obs columns; of a modality nothing, because all share one table.
    """

    layer: str
    matrix: str
    choice: FeatureChoice
    edits: ObsEdits = field(default_factory=ObsEdits)


@dataclass(frozen=True)
class _Seen:
    """One matrix that was looked at.

    Attributes
    ----------
    space
        Feature space that it is meant for.
    layer, words
        See :class:`FilePlan`.
    features
        Columns that may identify its features.
    column
        The one that the user names.
    obs_columns
        Names of the obs columns of the file; None for a modality.
    """

    space: str
    layer: str
    words: str
    features: FeatureTable
    column: str | None
    obs_columns: Sequence[str] | None = None


def plan_files(
    atlas: Writable,
    files: Sequence[Path],
    *,
    layer: Mapping[Path, str | None] | None = None,
    zarr_layer: str | None = None,
    field_name: str | None = None,
    obs_table: str | None = None,
    feature_id_column: str | Mapping[str, str] | None = None,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    obs_types: Mapping[str, str] | None = None,
    drop_obs: Sequence[str] = (),
    rename_obs: Mapping[str, str] | None = None,
    layers: Layers | None = None,
) -> dict[str, FilePlan]:
    """Choose for all files together; parameters as of :func:`add_from_anndata` and :func:`add_multimodal`.

    A file that cannot be read, or whose features nothing identifies, gets no plan: adding it says why.

    Parameters
    ----------
    files
        Files of one matrix, and .h5mu files, of which each modality is chosen for together with the files
        that have the same feature space.
    layer
        Matrix to read, by file.

    Returns
    -------
    dict
        Path as text -> plan; of a modality ``"path:modality"``.

    Raises
    ------
    UnknownNameError
        An option names an obs column that no file has.
    InvalidDataError
        A file shares fewer features than `require_shared_genes` says.
    """
    if not files:
        return {}
    session = atlas.session
    table = obs_table or only_table(session.obs_tables)
    fields = session.catalog.pointer_spaces(table)
    found: dict[str, _Seen] = {}
    for path in files:
        try:
            if path.suffix == ".h5mu":
                links = session.catalog.allow_links
                with H5muFile(path, allow_links=links) as modalities:
                    found |= _look_at_modalities(modalities, fields, table, feature_id_column, layers or {})
                continue
            space = get_space(fields[field_of(field_name or "gene_expression", fields, table)])
            column = feature_id_column if isinstance(feature_id_column, str) else None
            with open_source(path, allow_links=session.catalog.allow_links) as file:
                wanted = (layer or {}).get(path)
                counts = (zarr_layer or first_layer(space)) == "counts"
                found[str(path)] = _look_at(file, space.name, wanted, column, counts=counts)
        except (HbxError, OSError) as error:
            _log.info("%s is not planned: %s", path, error)
    edits = ObsEdits(obs_types or {}, drop_obs, rename_obs or {})
    alone = {path: seen.obs_columns for path, seen in found.items() if seen.obs_columns is not None}
    if alone and all(path.suffix != ".h5mu" for path in files):
        edits.check([name for names in alone.values() for name in names], ", ".join(alone))
    choices: dict[str, FeatureChoice | None] = {}
    with session.writing() as catalog:
        for space_name, column in dict.fromkeys((seen.space, seen.column) for seen in found.values()):
            group = [p for p, seen in found.items() if (seen.space, seen.column) == (space_name, column)]
            chosen = choose_together(
                catalog,
                space_name,
                [found[path].features for path in group],
                column=column,
                strip_versions=strip_versions,
                require_shared=require_shared_genes,
                lenient=True,
            )
            choices |= dict(zip(group, chosen, strict=True))
    return {
        path: FilePlan(seen.layer, seen.words, choice, edits.limited_to(seen.obs_columns or ()))
        for path, seen in found.items()
        if (choice := choices[path]) is not None
    }


def _look_at(
    file: AnnDataGroup,
    space: str,
    wanted: str | None,
    column: str | None,
    *,
    counts: bool,
    of_file: bool = True,
) -> _Seen:
    chosen = choose_for(file, wanted, counts=counts)
    name = wanted or (chosen.name if chosen else "X")
    if 0 in file.matrix(name).shape:
        # Adding it is refused, so its features have no say in how those of others are identified.
        raise InvalidDataError(f"{file.source} has no cells or no features")
    features = FeatureTable.of_frame(file.var(name), file.source)
    obs_columns = file.obs_columns() if of_file else None
    return _Seen(space, name, str(chosen) if chosen else name, features, column, obs_columns)


def _look_at_modalities(
    file: H5muFile,
    fields: Mapping[str, str],
    table: str,
    columns: str | Mapping[str, str] | None,
    layers: Layers,
) -> dict[str, _Seen]:
    """The matrices of an .h5mu file."""
    found: dict[str, _Seen] = {}
    for name in modalities_with_matrix(file):
        data = file.modality(name)
        _, space = resolve_modality(name, fields, table, data)
        if not space.has_features or space.repeats:
            continue
        target, wanted = next(iter(layers.get(name, {first_layer(space): None}).items()))
        column = columns.get(name) if isinstance(columns, Mapping) else columns
        wanted = wanted.removeprefix("layers/") if wanted is not None else None
        found[f"{file.path}:{name}"] = _look_at(
            data, space.name, wanted, column, counts=target == "counts", of_file=False
        )
    return found
