"""A recipe meets the columns of a dataset: tables, a program, and a report of what matched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import _program as p
from hbx_gpu.tokens._draws import MAX_INDEX
from hbx_gpu.tokens._lower_sampled import lower
from hbx_gpu.tokens._recipes import ObsTokens, RankValue, Recipe
from hbx_gpu.tokens._sampled import WeightedSentence

_VERSION = re.compile(r"^(.+)\.\d+$")
T = TypeVar("T")
_RESERVED = 4096  # indices at the end of the range, which special tokens draw with


@dataclass(frozen=True, slots=True)
class Report:
    """How a vocabulary meets a dataset.

    Attributes
    ----------
    n_features
        Columns of the dataset.
    matched
        Columns that have a token.
    n_tokens
        Tokens that these are: fewer where renamed genes are summed.
    vocabulary
        Entries of the vocabulary, special tokens included.
    dropped
        The first columns without a token, for a look.
    """

    n_features: int
    matched: int
    n_tokens: int
    vocabulary: int
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.matched:,} of {self.n_features:,} features are in the vocabulary of {self.vocabulary:,} "
            "entries"
        )
        if self.matched != self.n_tokens:
            text += f", {self.matched - self.n_tokens:,} of them summed with another of the same gene"
        if self.dropped:
            text += f"; without a token, among others: {', '.join(self.dropped)}"
        return text


@dataclass(frozen=True, slots=True)
class Compiled:
    """A recipe for one feature space: made once, used for every batch; picklable.

    Attributes
    ----------
    recipe, program, tables
        What was compiled, and what engines carry out.
    front, back
        Special tokens before and after the genes: ids, or the obs column that they come from.
    report
        What matched.
    fingerprint
        Of the feature space.
    """

    recipe: Recipe
    program: p.Program
    tables: p.Tables
    front: tuple[int | ObsTokens, ...]
    back: tuple[int, ...]
    report: Report
    fingerprint: str

    @property
    def n_features(self) -> int:
        """Columns of the dataset."""
        return len(self.tables.column)

    def check_features(self, feature_uids: Sequence[str] | np.ndarray) -> None:
        """Refuse another feature space than the one that this was compiled for.

        Raises
        ------
        InvalidDataError
            Its features are others, or in another order.
        """
        if fingerprint_of(feature_uids) != self.fingerprint:
            raise InvalidDataError(
                f"the feature space has changed since the recipe was compiled: it had {self.n_features} "
                "features, "
                f"and these are {len(feature_uids)}, or in another order. Compile the recipe again: pass the "
                "recipe itself, which loaders do on their own"
            )


def renamed(compiled: Compiled, made: Mapping[str, T]) -> dict[str, T]:
    """Outputs by the names that the model has for them."""
    names = compiled.recipe.names
    found = {names.get(name, name): output for name, output in made.items()}
    if len(found) < len(made):
        raise ValueError(
            f"names={dict(names)!r} gives an output the name of another, of {', '.join(made)}; "
            "give each a name of its own"
        )
    return found


def fingerprint_of(feature_uids: Sequence[str] | np.ndarray) -> str:
    """A digest of the features and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for uid in feature_uids:
        digest.update(str(uid).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def compile_recipe(
    recipe: Recipe, feature_uids: Sequence[str] | np.ndarray, *, columns: np.ndarray | None = None
) -> Compiled:
    """Meet a recipe with the columns of a dataset.

    Parameters
    ----------
    recipe
        What a model is fed.
    feature_uids
        (n_features,), the uid of each column.
    columns
        int (n_features,), the global number of each column where the dataset holds a selection of a wider
        feature space; it goes into draws. None: columns are numbered as they are.

    Raises
    ------
    InvalidDataError
        No feature is in the vocabulary; genes that need one have no median; too many columns.
    """
    uids = [str(uid) for uid in feature_uids]
    n = len(uids)
    index = np.arange(n) if columns is None else np.asarray(columns)
    if len(index) != n:
        raise ValueError(f"columns must number each of the {n} features, got {len(index)} numbers")
    if n and (index.min() < 0 or index.max() >= MAX_INDEX - _RESERVED):
        raise InvalidDataError(
            f"draws have room for feature numbers below {MAX_INDEX - _RESERVED}, and here is {index.max()}"
        )
    names = _names(recipe, uids)
    vocabulary: dict[str, int] = recipe.vocabulary  # type: ignore[assignment]
    usable = _usable(recipe)
    ids = np.array(
        [vocabulary.get(name, -1) if usable is None or name in usable else -1 for name in names], np.int64
    ).reshape(n)
    if not (ids >= 0).any():
        shown = ", ".join(map(repr, uids[:3])), ", ".join(map(repr, list(vocabulary)[-3:]))
        raise InvalidDataError(
            f"none of the {n} features is in the vocabulary, which has names such as {shown[1]}, while "
            f"features are called {shown[0]}. Do both hold the same kind of id? For Ensembl ids with a "
            "version, pass strip_versions=True; for renamed genes, mapping="
        )
    scale = _scales(recipe, names, ids)
    column = np.full(n, -1, np.int32)
    first: dict[int, int] = {}
    for c in np.flatnonzero(ids >= 0).tolist():
        column[c] = first.setdefault(int(ids[c]), c)
    own = column == np.arange(n)
    token = np.where(own, ids, -1).astype(np.int32)
    tables = p.Tables(column, token, scale, index.astype(np.int32), np.flatnonzero(own).astype(np.int32))
    dropped = tuple(uids[c] for c in np.flatnonzero(ids < 0)[:3])
    report = Report(n, int((ids >= 0).sum()), int(own.sum()), len(vocabulary), dropped)
    program, front, back = lower(recipe, names, tables)
    return Compiled(recipe, program, tables, front, back, report, fingerprint_of(uids))


def _names(recipe: Recipe, uids: list[str]) -> list[str]:
    """Features as the vocabulary may call them."""
    if recipe.strip_versions:
        uids = [found.group(1) if (found := _VERSION.match(uid)) else uid for uid in uids]
    mapping: Mapping[str, str] = recipe.mapping or {}  # type: ignore[assignment]
    return [mapping.get(uid, uid) for uid in uids]


def _usable(recipe: Recipe) -> Mapping[str, object] | None:
    """Genes that a recipe has everything for; None: all of its vocabulary."""
    if isinstance(recipe, RankValue) and recipe.missing_medians == "drop":
        return recipe.medians  # type: ignore[return-value]
    if isinstance(recipe, WeightedSentence):
        chromosomes: Mapping[str, object] = recipe.chromosomes  # type: ignore[assignment]
        starts: Mapping[str, object] = recipe.starts  # type: ignore[assignment]
        return {name: 1 for name in chromosomes if name in starts}
    return None


def _scales(recipe: Recipe, names: list[str], ids: np.ndarray) -> np.ndarray:
    """What each column's value is divided by or multiplied by; 1 where there is nothing."""
    scale = np.ones(len(names), np.float64)
    if not isinstance(recipe, RankValue):
        return scale
    medians: Mapping[str, float] = recipe.medians  # type: ignore[assignment]
    known = np.flatnonzero(ids >= 0).tolist()
    missing = [names[c] for c in known if names[c] not in medians]
    if missing:
        raise InvalidDataError(
            f"{len(missing)} genes of the dataset have a token but no median, such as "
            f"{', '.join(missing[:3])}. Were vocabulary and medians published together? "
            'missing_medians="drop" leaves such genes out'
        )
    for c in known:
        scale[c] = medians[names[c]]
    if recipe.arithmetic in ("f64_recip", "f32_recip"):
        scale = 1.0 / scale
    if recipe.arithmetic == "f32_eps":
        scale = (scale.astype(np.float32) + np.float32(1e-6)).astype(np.float64)
    return scale
