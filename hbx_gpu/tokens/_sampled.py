"""Recipes of models that sample a cell's genes: UCE, State's embedding, CellariumGPT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens._recipes import ObsTokens, Recipe, Token, _one_of, _positive, _probability, _room, _set
from hbx_gpu.tokens._tables import Table, read_table


@dataclass(frozen=True, slots=True)
class WeightedSentence(Recipe):
    """Genes drawn by ``log1p(count)``, with replacement, chromosome by chromosome: UCE.

    ``input_ids``: `cls`; then for each chromosome that was drawn, in random order, its opening token, its
    genes by start position (equal starts: ascending column), and `close`.

    Attributes
    ----------
    chromosomes
        Feature uid -> code of its chromosome: a dict or a path, as `vocabulary`.
    starts
        Feature uid -> where it starts on the chromosome.
    samples
        Genes to draw.
    length
        Tokens at most.
    cls, close, pad
        Special tokens.
    chromosome_offset
        Opening tokens are codes plus this.
    """

    chromosomes: Table = field(kw_only=True, repr=False)
    starts: Table = field(kw_only=True, repr=False)
    samples: int = field(default=1024, kw_only=True)
    length: int = field(default=1536, kw_only=True)
    cls: Token = field(default=3, kw_only=True)
    close: Token = field(default=2, kw_only=True)
    pad: Token = field(default=0, kw_only=True)
    chromosome_offset: int = field(default=143_574, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _set(self, chromosomes=_whole(self.chromosomes, "chromosomes"), starts=_whole(self.starts, "starts"))
        _room(self.length, 1)
        _room(self.samples, 0)
        for role in ("cls", "close", "pad"):
            self.token_id(getattr(self, role), role)


@dataclass(frozen=True, slots=True)
class GeneSentence(Recipe):
    """The highest expressed genes, equal ones in random order, and genes to predict: State's embedding (SE).

    ``input_ids`` (n, length): `cls_gene`, then genes by falling expression; where there are too few, genes
    that are not expressed, at random. ``values``: 100 times each gene's share of the summed logarithms.
    ``task_ids`` and ``task_values``: genes to predict and their logarithms; ``totals``: the sum of those.

    Attributes
    ----------
    length
        Tokens of each row.
    values
        What rows hold: ``"counts"``, or their logarithms (``"log1p"``).
    cls_gene
        Which of the known genes stands first; the model puts a vector of its own there.
    tasks
        Genes to predict: expressed, unexpressed, and shared by the batch.
    n_ids
        Shared genes are drawn from ids 0 .. n_ids - 1; None: all ids up to the highest.
    reference_unexpressed
        Count genes with a logarithm below 1 as unexpressed, as arc-state does: those of count 1 too.
    """

    length: int = field(default=2048, kw_only=True)
    values: Literal["counts", "log1p"] = field(default="counts", kw_only=True)
    cls_gene: int = field(default=3, kw_only=True)
    tasks: tuple[int, int, int] = field(default=(512, 512, 512), kw_only=True)
    n_ids: int | None = field(default=None, kw_only=True)
    reference_unexpressed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _one_of("values", self.values, ("counts", "log1p"))
        _room(self.length, 1)
        if len(self.tasks) != 3 or min(self.tasks) < 0:
            raise ValueError(f"tasks must be three numbers of genes, got {self.tasks}")
        _set(self, tasks=tuple(self.tasks))


@dataclass(frozen=True, slots=True)
class PromptQuery(Recipe):
    """Random genes, some with their counts and some to guess them, and labels of the cell: CellariumGPT.

    A row of ``length`` positions: genes, then one position for each entry of `metadata`. ``values``: log1p of
    counts that are shown; ``query_mask``: 1 where a count is to be guessed; ``total_counts``: log1p of the
    total that each gene was thinned to; ``prompt_mask``: what is shown; ``labels`` and ``label_weights``:
    counts to guess; ``metadata_ids``, ``metadata_labels``, ``metadata_mask`` (n_rows, k): codes, hidden ones
    replaced.

    Attributes
    ----------
    length
        Positions, those of metadata included.
    metadata
        Obs columns as ids; an id below 0 means unknown: 0, and hidden.
    metadata_masks
        What hidden codes become, an id for each entry of `metadata`; None: one more than its highest id.
    thinned
        Share of the genes whose counts are thinned, as if fewer molecules had been read.
    min_umis, max_umis
        Totals that counts are thinned to.
    prefix
        Genes that are shown; None: drawn, with probability 0.1 for none and 1 / k for k, all divided by
        their sum.
    prompts
        Metadata columns that are shown; None: drawn.
    value_vocabulary
        Labels are below this.
    predict
        All genes in column order and rounded shares of counts instead of draws; those of `queries` are to be
        guessed.
    queries
        Feature uids to guess, for `predict`.
    measured_only
        Genes that were not measured where a cell is from are neither shown nor to be guessed. False takes
        their zeros for counts.
    """

    length: int = field(kw_only=True)
    metadata: tuple[ObsTokens, ...] = field(default=(), kw_only=True)
    metadata_masks: tuple[int, ...] | None = field(default=None, kw_only=True)
    thinned: float = field(default=0.5, kw_only=True)
    min_umis: float = field(default=1000.0, kw_only=True)
    max_umis: float = field(default=100_000.0, kw_only=True)
    prefix: int | None = field(default=None, kw_only=True)
    prompts: tuple[str, ...] | None = field(default=None, kw_only=True)
    value_vocabulary: int = field(default=2000, kw_only=True)
    predict: bool = field(default=False, kw_only=True)
    queries: frozenset[str] = field(default=frozenset(), kw_only=True)
    measured_only: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _set(self, metadata=tuple(self.metadata), queries=frozenset(self.queries))
        if self.metadata_masks is None:
            masks = tuple(max([*map(int, one.ids.values()), -1]) + 1 for one in self.metadata)
            _set(self, metadata_masks=masks)
        _room(self.length, len(self.metadata))
        _probability("thinned", self.thinned)
        _positive("min_umis", self.min_umis)
        _positive("max_umis", self.max_umis)
        _positive("value_vocabulary", self.value_vocabulary)
        n_genes = self.length - len(self.metadata)
        if self.prefix is not None and not 0 <= self.prefix < n_genes:
            raise ValueError(f"prefix must be in 0 .. {n_genes - 1}, got {self.prefix}")
        if unknown := set(self.prompts or ()) - {one.column for one in self.metadata}:
            raise ValueError(f"prompts must be columns of metadata, got {sorted(unknown)}")


def _whole(table: Table, what: str) -> Mapping[str, int]:
    """A table of whole numbers of at least 0."""
    found: dict[str, int] = {}
    for name, value in read_table(table, what).items():
        number = value if isinstance(value, int | float | np.integer | np.floating) else -1
        if not 0 <= number < 2**31 or int(number) != number:
            raise InvalidDataError(
                f"{what}: the value of {name!r} must be a whole number in 0 .. 2**31 - 1, got {value!r}"
            )
        found[name] = int(number)
    return found
