"""What is chosen for several files together before the first one is added: matrices, ids, obs columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu._stores.source import open_source
from hbx_gpu.atlas._catalogue.names import only_table
from hbx_gpu.atlas._catalogue.session import Writable
from hbx_gpu.atlas._ingest.anndata import field_of, first_layer
from hbx_gpu.atlas._ingest.identity import choose_together
from hbx_gpu.atlas._ingest.inputs import choose_for
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.errors import HbxError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilePlan:
    """What was chosen for one file.

    Attributes
    ----------
    layer
        Matrix to read.
    matrix
        The same in words, with what it holds where that was looked at.
    choice
        How its features are identified.
    edits
        What is changed about its obs columns.
    """

    layer: str
    matrix: str
    choice: FeatureChoice
    edits: ObsEdits


def plan_files(
    atlas: Writable,
    files: Sequence[Path],
    *,
    layer: Mapping[Path, str | None] | None = None,
    zarr_layer: str | None = None,
    field_name: str | None = None,
    obs_table: str | None = None,
    feature_id_column: str | None = None,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    obs_types: Mapping[str, str] | None = None,
    drop_obs: Sequence[str] = (),
    rename_obs: Mapping[str, str] | None = None,
) -> dict[str, FilePlan]:
    """Choose for all files together; parameters as of :func:`add_from_anndata`, `layer` by file.

    A file that cannot be read, or whose features nothing identifies, gets no plan: adding it says why.

    Returns
    -------
    dict
        Path as text -> plan.

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
    fields = session.catalogue.pointer_spaces(table)
    space = get_space(fields[field_of(field_name or "gene_expression", fields, table)])
    counts = (zarr_layer or first_layer(space)) == "counts"
    found: dict[str, tuple[str, str, FeatureTable, list[str]]] = {}
    for path in files:
        try:
            with open_source(path) as file:
                wanted = (layer or {}).get(path)
                chosen = choose_for(file, wanted, counts=counts)
                name = wanted or (chosen.name if chosen else "X")
                features = FeatureTable.of_frame(file.var(name), str(path))
                words = str(chosen) if chosen else name
                found[str(path)] = (name, words, features, file.obs_columns())
        except (HbxError, OSError) as error:
            _log.info("%s is not planned: %s", path, error)
    edits = ObsEdits(obs_types or {}, drop_obs, rename_obs or {})
    if found:
        edits.check([name for *_, columns in found.values() for name in columns], ", ".join(found))
    with session.writing() as catalogue:
        choices = choose_together(
            catalogue,
            space.name,
            [features for _, _, features, _ in found.values()],
            column=feature_id_column,
            strip_versions=strip_versions,
            require_shared=require_shared_genes,
            lenient=True,
        )
    return {
        path: FilePlan(name, words, choice, edits.limited_to(columns))
        for (path, (name, words, _, columns)), choice in zip(found.items(), choices, strict=True)
        if choice is not None
    }
