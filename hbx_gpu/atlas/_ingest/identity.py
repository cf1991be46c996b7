"""How features of files are told apart in an atlas: chosen with what it holds, compared, and said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from hbx_gpu._identity.choice import FeatureChoice, KnownFeatures, choose
from hbx_gpu._identity.overlap import compare, require
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu.atlas._catalog.catalog import Catalog

_log = logging.getLogger(__name__)

GivenColumn = str | FeatureChoice | None
"""How features are identified: a column of var, what was chosen for all files together, or to be chosen."""


def known_features(catalog: Catalog, feature_space: str) -> KnownFeatures:
    """The features of a space in an atlas, and the columns from which its datasets took their ids."""
    if feature_space not in catalog.names.registries:
        return KnownFeatures(())
    uids = tables.read(catalog.registry(feature_space), ["uid"]).column("uid").to_pylist()
    columns: list[str] = []
    if "feature_id_column" in catalog.datasets().schema.names:
        rows = catalog.dataset_rows(f"feature_space = {tables.quoted(feature_space)}")
        columns = [row["feature_id_column"] for row in reversed(rows) if row["feature_id_column"]]
    return KnownFeatures(frozenset(uids), tuple(dict.fromkeys(columns)))


def identify(
    catalog: Catalog,
    feature_space: str,
    var: pd.DataFrame,
    source: str,
    given: GivenColumn,
    *,
    strip_versions: bool = False,
    require_shared: float | None = None,
) -> tuple[FeatureChoice, list[str]]:
    """How the features of one file are identified, and the id of each. Says it if the atlas has few of them.

    Raises
    ------
    InvalidDataError
        Ids that are missing, repeated or not texts; fewer are shared than the caller requires.
    """
    table = FeatureTable.of_frame(var, source)
    if isinstance(given, FeatureChoice):
        choice = given
    else:
        (found,) = choose_together(
            catalog,
            feature_space,
            [table],
            column=given,
            strip_versions=strip_versions,
            require_shared=require_shared,
        )
        assert found is not None  # only where lenient
        choice = found
    return choice, choice.ids(table)


def choose_together(
    catalog: Catalog,
    feature_space: str,
    files: Sequence[FeatureTable],
    *,
    column: str | None = None,
    strip_versions: bool = False,
    require_shared: float | None = None,
    lenient: bool = False,
) -> list[FeatureChoice | None]:
    """Choose how the features of several files are identified, and say which of them share few features.

    Every file is compared with the atlas and the files before it.

    Parameters
    ----------
    catalog, feature_space
        The atlas, and where its features are.
    files
        The features of every file.
    column, strip_versions
        As the user names them; see :func:`hbx_gpu._identity.choice.choose`.
    require_shared
        Least share of the smaller set; None: any share is accepted, and reported.
    lenient
        Give None for files whose features the choice does not identify, instead of raising.

    Raises
    ------
    InvalidDataError
        Ids that are missing, repeated or not texts; a file shares less than `require_shared`.
    """
    known = known_features(catalog, feature_space)
    chosen = choose(files, known, column=column, strip_versions=strip_versions)
    there = set(known.uids)
    texts = _text_columns(catalog, feature_space) if there else {}
    out: list[FeatureChoice | None] = []
    for table, choice in zip(files, chosen, strict=True):
        try:
            choice.ids(table)
        except InvalidDataError:
            if not lenient:
                raise
            out.append(None)
            continue
        if there:
            overlap = compare(table, choice, there, columns=texts)
            require(overlap, require_shared)
            if overlap.is_small:
                _log.warning("warning: %s", overlap)
        there.update(choice.ids(table))
        out.append(FeatureChoice(choice.column, choice.strip_versions, choice.reason, said=True))
    return out


def _text_columns(catalog: Catalog, feature_space: str) -> dict[str, set[str]]:
    registry = catalog.registry(feature_space)
    names = [f.name for f in registry.schema if pa.types.is_string(f.type) and f.name != "uid"]
    found = tables.read(registry, names) if names else pa.table({})
    return {name: set(found.column(name).drop_null().to_pylist()) for name in names}
