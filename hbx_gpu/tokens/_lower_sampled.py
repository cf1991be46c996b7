"""Recipes that sample genes, lowered to programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import _program as p
from hbx_gpu.tokens._lower import Lowered, lower
from hbx_gpu.tokens._sampled import GeneSentence, PromptQuery, WeightedSentence

__all__ = ["Prompt", "Ranked", "Weighted", "lower"]


@dataclass(frozen=True, slots=True)
class Weighted:
    """Genes drawn with replacement, by chromosome; see :class:`WeightedSentence`.

    Attributes
    ----------
    chromosome, place
        int32 (n_features,). Chromosome of each column, and its place in the order of all starts.
    codes, bounds
        int64 (k,) and (k + 1,). Chromosomes of known genes. Of known genes sorted by chromosome and start,
        those of ``codes[c]`` are ``bounds[c]`` up to ``bounds[c + 1]``.
    turn, tokens
        int32 (n_features,) and (n_known,). Where each column stands in that order, and ids in that order.
    """

    length: int
    samples: int
    cls: int
    close: int
    pad_id: int
    offset: int
    chromosome: np.ndarray
    place: np.ndarray
    codes: np.ndarray
    bounds: np.ndarray
    turn: np.ndarray
    tokens: np.ndarray
    zeros: bool = False
    pad_value: float = 0.0


@dataclass(frozen=True, slots=True)
class Ranked:
    """The highest genes and genes to predict; see :class:`GeneSentence`.

    Attributes
    ----------
    cls_column
        Column of the gene that stands first.
    """

    length: int
    logged: bool
    cls_column: int
    tasks: tuple[int, int, int]
    n_ids: int
    count_one_absent: bool
    zeros: bool = False
    pad_id: int = 0
    pad_value: float = 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Genes shown and genes to guess; see :class:`PromptQuery`.

    Attributes
    ----------
    prefix_sums
        uint64 (k,). A 64-bit key below the k-th shows at most k genes; empty where `prefix` is fixed.
    shown
        bool (m,). Metadata that is shown; empty where that is drawn.
    query
        bool (n_features,). Columns to guess, where nothing is drawn.
    """

    length: int
    metadata_masks: tuple[int, ...]
    thinned: float
    min_umis: float
    max_umis: float
    prefix: int
    prefix_sums: np.ndarray
    shown: np.ndarray
    value_vocabulary: int
    predict: bool
    query: np.ndarray
    zeros: bool = True
    pad_id: int = 0
    pad_value: float = 0.0


@lower.register(WeightedSentence)
def _(recipe: WeightedSentence, names: list[str], tables: p.Tables) -> Lowered:
    chromosomes: Mapping[str, int] = recipe.chromosomes  # type: ignore[assignment]
    starts: Mapping[str, int] = recipe.starts  # type: ignore[assignment]
    chromosome = np.zeros(len(names), np.int32)
    start = np.zeros(len(names), np.int64)
    for c in tables.known.tolist():
        chromosome[c], start[c] = chromosomes[names[c]], starts[names[c]]
    place = np.empty(len(names), np.int32)
    place[np.argsort(start, kind="stable")] = np.arange(len(names), dtype=np.int32)
    order = np.lexsort((place[tables.known], chromosome[tables.known]))
    codes, first = np.unique(chromosome[tables.known][order], return_index=True)
    turn = np.zeros(len(names), np.int32)
    turn[tables.known[order]] = np.arange(len(order), dtype=np.int32)
    program = Weighted(
        recipe.length,
        recipe.samples,
        recipe.token_id(recipe.cls, "cls"),
        recipe.token_id(recipe.close, "close"),
        recipe.token_id(recipe.pad, "pad"),
        recipe.chromosome_offset,
        chromosome,
        place,
        codes.astype(np.int64),
        np.append(first, len(order)).astype(np.int64),
        turn,
        tables.token[tables.known[order]],
    )
    return program, (), ()


@lower.register(GeneSentence)
def _(recipe: GeneSentence, names: list[str], tables: p.Tables) -> Lowered:  # noqa: ARG001
    if recipe.cls_gene >= len(tables.known):
        raise InvalidDataError(
            f"cls_gene={recipe.cls_gene} is the number of a known gene, and the dataset has "
            f"{len(tables.known)}"
        )
    n_ids = recipe.n_ids or max(recipe.vocabulary.values()) + 1  # type: ignore[union-attr]
    column = int(tables.known[recipe.cls_gene])
    logged = recipe.values == "log1p"
    return (
        Ranked(recipe.length, logged, column, recipe.tasks, n_ids, recipe.reference_unexpressed),
        (),
        (),
    )


@lower.register(PromptQuery)
def _(recipe: PromptQuery, names: list[str], tables: p.Tables) -> Lowered:
    n_genes = recipe.length - len(recipe.metadata)
    if len(tables.known) < n_genes:
        raise InvalidDataError(
            f"length={recipe.length} asks for {n_genes} genes of each cell, and {len(tables.known)} are known"
        )
    sums = np.empty(0, np.uint64)
    if recipe.prefix is None:
        weights = np.array([0.1, *(1.0 / np.arange(1, n_genes))])
        sums = np.minimum(np.cumsum(weights) / weights.sum() * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
        sums[-1] = np.uint64(2**64 - 1)
    shown = np.empty(0, bool)
    if recipe.prompts is not None or recipe.predict:
        shown = np.array([one.column in (recipe.prompts or ()) for one in recipe.metadata], bool)
        if recipe.predict and recipe.prompts is None:
            shown[:] = True
    query = np.array([name in recipe.queries for name in names], bool)
    assert recipe.metadata_masks is not None
    program = Prompt(
        recipe.length,
        recipe.metadata_masks,
        recipe.thinned,
        recipe.min_umis,
        recipe.max_umis,
        recipe.prefix or 0,
        sums,
        shown,
        recipe.value_vocabulary,
        recipe.predict,
        query,
    )
    return program, recipe.metadata, ()
