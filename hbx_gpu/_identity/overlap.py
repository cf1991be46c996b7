"""Whether files mean the same features: how many ids they share, and what would make them share more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hbx_gpu._advice import option
from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._identity.tables import FeatureTable, without_versions
from hbx_gpu.errors import InvalidDataError

# Of the smaller set of ids; below, somebody should look.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Overlap:
    """Overlap of the ids of one file with those of a collection.

    Attributes
    ----------
    where
        The file.
    choice
        How its features are identified.
    n_file, n_known, n_shared
        Number of ids in the file, in the collection, in both.
    remedies
        Sentences that say how more ids could be matched.
    example
        An id of the file, and one of the collection.
    parameter
        Name of the parameter that takes the column, for messages.
    """

    where: str
    choice: FeatureChoice
    n_file: int
    n_known: int
    n_shared: int
    remedies: tuple[str, ...]
    example: tuple[str, str]
    parameter: str = "feature_id_column"

    @property
    def fraction(self) -> float:
        """Shared ids, of the smaller of both sets; 1 if one is empty."""
        smaller = min(self.n_file, self.n_known)
        return self.n_shared / smaller if smaller else 1.0

    @property
    def is_small(self) -> bool:
        """Whether the user should be warned."""
        return self.fraction < _ENOUGH

    def __str__(self) -> str:
        if not self.n_shared:
            how = f"none of its {self.n_file:,} features is"
        else:
            how = f"only {self.n_shared:,} of its {self.n_file:,} features are"
        advice = (
            "; ".join(self.remedies)
            if self.remedies
            else (
                f"if they are the same genes under other names, name the column that joins them with "
                f"{option(self.parameter)}"
            )
        )
        return (
            f"{self.where}: {how} among the {self.n_known:,} that are there (ids from {self.choice}, such as "
            f"{self.example[0]!r}; there {self.example[1]!r}): they share few genes, so their columns stay "
            f"apart. {advice[:1].upper()}{advice[1:]}"
        )


def compare(
    table: FeatureTable,
    choice: FeatureChoice,
    known: Collection[str],
    *,
    columns: Mapping[str, Collection[str]] | None = None,
    parameter: str = "feature_id_column",
) -> Overlap:
    """Compare the ids of a file with those of a collection.

    Parameters
    ----------
    table, choice
        The features and how they are identified.
    known
        Ids of the collection.
    columns
        Further columns that describe the features of the collection.
    parameter
        How the caller's callers name the column, for messages.
    """
    ids, there = set(choice.ids(table, parameter=parameter)), set(known)
    n_shared = len(ids & there)
    smaller = min(len(ids), len(there))
    remedies: list[str] = []
    if smaller and n_shared < _ENOUGH * smaller:
        remedies = _remedies(table, choice, ids, there, columns or {}, n_shared, parameter)
    example = (min(ids, default=""), min(there, default=""))
    return Overlap(table.where, choice, len(ids), len(there), n_shared, tuple(remedies), example, parameter)


def _remedies(
    table: FeatureTable,
    choice: FeatureChoice,
    ids: set[str],
    there: set[str],
    columns: Mapping[str, Collection[str]],
    n_shared: int,
    parameter: str,
) -> list[str]:
    found = []
    for name in table.candidates():
        if table.names_positions(name):
            continue  # they meet other numbers by chance
        if name != choice.column and (n := len(set(table.texts(name) or ()) & there)) > n_shared:
            found.append(f"by column {name!r}, {n:,} are shared: {option(parameter, name)}")
    plain, plain_there = set(without_versions(ids)), set(without_versions(there))
    if (n := len(plain & plain_there)) > n_shared and (plain != ids or plain_there != there):
        if plain_there == there:
            found.append(f"without versions, {n:,} are shared: {option('strip_versions', 'True')}")
        else:
            found.append(
                f"without versions, {n:,} are shared, but those that are there have versions: begin anew "
                f"with {option('strip_versions', 'True')} for all files"
            )
    if (n := len({uid.casefold() for uid in ids} & {uid.casefold() for uid in there})) > n_shared:
        found.append(f"but for upper and lower case, {n:,} are shared: write the names alike in the files")
    for name, values in columns.items():
        if (n := len(ids & set(values))) > n_shared:
            found.append(
                f"{n:,} are in column {name!r} of the features that are there: to join by it, begin anew "
                f"with {option(parameter, name)} for those files"
            )
    return found


def require(overlap: Overlap, fraction: float | None) -> None:
    """Refuse a file that shares less than a fraction of the smaller set.

    Raises
    ------
    InvalidDataError
        The file shares less.
    """
    if fraction is not None and overlap.fraction < fraction:
        raise InvalidDataError(
            f"{overlap}. Refused, because {option('require_shared_genes', f'{fraction:g}')} was asked for "
            f"and {overlap.fraction:.2g} of the smaller set is shared"
        )
