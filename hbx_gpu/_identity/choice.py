"""Chooses the column that identifies features, for all files together and in accord with the collection."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hbx_gpu._advice import option
from hbx_gpu._identity.tables import (
    INDEX,
    SYMBOLS,
    UNIQUE_NAMES,
    USUAL,
    FeatureTable,
    mostly_stable,
    without_versions,
)
from hbx_gpu.errors import InvalidDataError

# Columns in which writers of atlases store the ids.
_DECLARED = ("global_feature_uid", "uid")
_SHOWN = 5


@dataclass(frozen=True)
class FeatureChoice:
    """How the features of one file are identified.

    Attributes
    ----------
    column
        Column of var, :data:`INDEX` for the names, :data:`UNIQUE_NAMES` for the names with repeats numbered.
    strip_versions
        Whether versions of Ensembl ids are dropped.
    reason
        Why this column, in a few words.
    said
        Whether the ids have been compared with those of the atlas and any warnings given.
    """

    column: str
    strip_versions: bool = False
    reason: str = ""
    said: bool = False

    def ids(self, table: FeatureTable, *, parameter: str = "feature_id_column") -> list[str]:
        """The ids of the features of a table.

        Parameters
        ----------
        table
            The features.
        parameter
            How the caller's callers name the column, for messages.

        Raises
        ------
        InvalidDataError
            No such column; ids that are missing, repeated or not texts. Says which columns would do.
        """
        if not table.has(self.column):
            raise InvalidDataError(
                f"{table.where}: var has no column {self.column!r}; it has "
                f"{[name for name in table.columns if name != INDEX]}, and its index"
            )
        what = "the index" if self.column == INDEX else f"column {self.column!r}"
        ids = table.texts(self.column)
        if ids is None:
            raise InvalidDataError(
                f"{table.where}: {what} of var holds values that are missing or not strings; "
                f"{self._advice(table, parameter)}"
            )
        if len(set(ids)) < len(ids):
            twice = _repeated(ids)
            raise InvalidDataError(
                f"{table.where}: {what} of var names {len(twice)} feature(s) more than once, for example "
                f"{twice[:_SHOWN]}; {self._advice(table, parameter)}"
            )
        if not self.strip_versions:
            return ids
        stripped = without_versions(ids)
        if twice := _repeated(stripped):
            raise InvalidDataError(
                f"{table.where}: without versions, {what} of var names {len(twice)} feature(s) more than "
                f"once, for example {twice[:_SHOWN]}; leave {option('strip_versions')} out"
            )
        return stripped

    def _advice(self, table: FeatureTable, parameter: str) -> str:
        """Which other columns would do."""
        if good := [name for name in table.candidates() if name != self.column]:
            return f"name one that is unique with {option(parameter)}: {good}"
        if table.texts(INDEX) is not None:
            return (
                f"no column of var is unique; {option(parameter, UNIQUE_NAMES)} numbers repeated names "
                "(a, a-1, ...) as AnnData's var_names_make_unique does, in the order of each file"
            )
        return "no column of var is unique; add one"

    def __str__(self) -> str:
        known = {INDEX: "the index of var", UNIQUE_NAMES: "the index of var, repeated names numbered"}
        what = known.get(self.column, f"var[{self.column!r}]")
        return what + (" without versions" if self.strip_versions else "")


def _repeated(ids: Sequence[str]) -> list[str]:
    if len(set(ids)) == len(ids):
        return []
    seen: set[str] = set()
    return list(dict.fromkeys(uid for uid in ids if uid in seen or seen.add(uid)))  # type: ignore[func-returns-value]


@dataclass(frozen=True)
class KnownFeatures:
    """Features that a collection already has.

    Attributes
    ----------
    uids
        Ids of its features.
    columns
        Columns from which the ids of its files came.
    """

    uids: Collection[str]
    columns: Sequence[str] = ()


def choose(
    tables: Sequence[FeatureTable],
    known: KnownFeatures | None = None,
    *,
    column: str | None = None,
    strip_versions: bool = False,
    same_column: bool = False,
) -> list[FeatureChoice]:
    """Choose how the features of several files are identified, for all of them together.

    A unique index does not prove that it names genes, and numbers 0, 1, 2, ... never do while another
    column identifies them. What is taken, the first that is there: what the user names; the columns
    ``global_feature_uid`` or ``uid`` of every file; of a collection that has features, the column that shares
    most with them; ids of a database (Ensembl and the like), if every file has a column of such; the
    names, or another column that identifies the features in every file.

    Parameters
    ----------
    tables
        The features of every file.
    known
        What the collection uses already; None or no uids: it is new.
    column
        Column of var that the user names, :data:`INDEX` for the names.
    strip_versions
        Whether versions of Ensembl ids are dropped.
    same_column
        Whether it must be one column for all tables, and a well-known one where several would do.

    Returns
    -------
    list of FeatureChoice
        One per table; none where `same_column` finds no column. Whether the column identifies its features
        shows :meth:`FeatureChoice.ids`.
    """
    if column is not None:
        return [FeatureChoice(column, strip_versions, "as asked for") for _ in tables]
    for name in _DECLARED:
        if tables and all(name in table.columns for table in tables):
            return [FeatureChoice(name, strip_versions, "declared in var") for _ in tables]
    if known is not None and known.uids:
        return [_as_known(table, known, strip_versions) for table in tables]
    if same_column:
        found = _same_for_all(tables)
        return [FeatureChoice(found[0], strip_versions, found[1]) for _ in tables] if found else []
    return [FeatureChoice(name, strip_versions, reason) for name, reason in _together(tables)]


def shared(table: FeatureTable, column: str, uids: Collection[str], *, strip_versions: bool = False) -> int:
    """How many ids of a column are among some others."""
    ids = table.texts(column) or []
    return len(set(without_versions(ids) if strip_versions else ids) & set(uids))


def _as_known(table: FeatureTable, known: KnownFeatures, strip_versions: bool) -> FeatureChoice:
    uids = set(known.uids)
    candidates = table.candidates()
    counts = {name: shared(table, name, uids, strip_versions=strip_versions) for name in candidates}
    # Numbers meet other numbers by chance: positions count only where nothing else identifies anything.
    real = [name for name in candidates if not table.names_positions(name)] or candidates
    best = max(real, key=lambda name: (counts[name], name in known.columns), default=None)
    if best is None and UNIQUE_NAMES in known.columns and table.texts(INDEX) is not None:
        return FeatureChoice(UNIQUE_NAMES, strip_versions, "as in the atlas")
    if best is not None and counts[best]:
        return FeatureChoice(best, strip_versions, "as in the atlas")
    if before := next((name for name in known.columns if name in real), None):
        return FeatureChoice(before, strip_versions, "the column of the atlas's other files")
    stable = next((name for name in real if table.is_stable(name)), None)
    if stable is not None and mostly_stable(list(known.uids)):
        return FeatureChoice(stable, strip_versions, "ids of a database, as in the atlas")
    ((name, reason),) = _together([table])
    return FeatureChoice(name, strip_versions, reason)


def _same_for_all(tables: Sequence[FeatureTable]) -> tuple[str, str] | None:
    if not tables:
        return None
    stable = [name for name in tables[0].candidates() if all(table.is_stable(name) for table in tables)]
    if stable:
        return stable[0], "ids of a database"
    good = [name for name in tables[0].candidates() if all(table.identifies(name) for table in tables)]
    real = [name for name in good if not all(table.names_positions(name) for table in tables)]
    usual = [name for name in (INDEX, *USUAL, *SYMBOLS) if name in real]
    if usual:
        return usual[0], "the names" if usual[0] == INDEX else "identifies the features of every file"
    if len(real) == 1 or (real and len(tables) == 1):
        return real[0], "identifies the features of every file"
    if not real and INDEX in good:
        return INDEX, "positions; nothing else identifies the features"
    return None


def _together(tables: Sequence[FeatureTable]) -> list[tuple[str, str]]:
    stable = [[name for name in table.candidates() if table.is_stable(name)] for table in tables]
    if all(stable):
        return [(name, "ids of a database") for name in _most_alike(tables, stable)]
    everywhere = [
        name
        for name in (INDEX, *USUAL, *SYMBOLS, *(tables[0].columns if tables else ()))
        if all(table.identifies(name) and not table.names_positions(name) for table in tables)
    ]
    if everywhere:
        reason = "the names" if everywhere[0] == INDEX else "identifies the features of every file"
        return [(everywhere[0], reason) for _ in tables]
    return [_alone(table) for table in tables]


def _most_alike(tables: Sequence[FeatureTable], columns: Sequence[Sequence[str]]) -> list[str]:
    """Per table one of its columns: the one that shares most with the tables before it."""
    seen: set[str] = set()
    out = []
    for table, names in zip(tables, columns, strict=True):
        best = max(names, key=lambda name: shared(table, name, seen))
        seen.update(table.texts(best) or ())
        out.append(best)
    return out


def _alone(table: FeatureTable) -> tuple[str, str]:
    if table.identifies(INDEX) and not table.names_positions(INDEX):
        return INDEX, "the names"
    candidates = table.candidates()
    if not candidates:
        return INDEX, "the names"
    positions = table.names_positions(candidates[0])
    return candidates[
        0
    ], "positions; nothing else identifies the features" if positions else "the first that is unique"
