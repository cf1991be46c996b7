"""What a model is fed, as frozen recipes. They hold choices only: `_compile` and engines do the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.statistics import Statistics
from hbx_gpu.tokens._tables import Table, read_ids, read_scales, read_table

Token: TypeAlias = "str | int"
"""A special token: its name in the vocabulary, or its id."""


def _set(recipe: object, **values: object) -> None:
    """Fields of a frozen dataclass, while it is made."""
    for name, value in values.items():
        object.__setattr__(recipe, name, value)


def _one_of(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


OUTPUTS = frozenset(
    (
        "input_ids", "attention_mask", "lengths", "values", "counts", "labels", "mask", "masked_values",
        "gen_ids", "gen_values", "gen_lengths", "task_ids", "task_values", "totals", "query_mask",
        "prompt_mask", "total_counts", "label_weights", "metadata_ids", "metadata_labels", "metadata_mask",
        "cu_seqlens", "max_seqlen",
    )
)  # fmt: skip
"""What recipes may make, by our names."""


def _check_names(names: Mapping[str, str], aux: Mapping[str, object]) -> None:
    """Refuse names that rename nothing, or that give two outputs one name."""
    known = OUTPUTS | set(aux)
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"names: there is no output {unknown[0]!r} to rename; outputs are {', '.join(sorted(known))}"
        )
    owner: dict[str, str] = {}
    for name in sorted({*names, "input_ids", "attention_mask", "lengths"}):  # the others are not always there
        other = owner.setdefault(names.get(name, name), name)
        if other != name:
            raise ValueError(
                f"names: {other!r} and {name!r} would both be called {names.get(name, name)!r}; give each "
                "output a name of its own"
            )


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability, in 0 .. 1, got {value}")


@dataclass(frozen=True, slots=True)
class ObsTokens:
    """Values of an obs column as ids.

    Attributes
    ----------
    column
        Name of the column; the dataset must have been opened with it.
    ids
        Value of the column -> id.
    unknown
        Id of values that `ids` does not have; None: such a value is an error.
    """

    column: str
    ids: Mapping[Any, int]
    unknown: int | None = None

    def id_of(self, value: object) -> int:
        """The id of one value."""
        if value in self.ids:
            return int(self.ids[value])
        if self.unknown is None:
            raise InvalidDataError(
                f"obs column {self.column!r} holds {value!r}, which ObsTokens has no id for; add it to "
                "`ids`, or give `unknown`, the id of all others"
            )
        return int(self.unknown)


@dataclass(frozen=True, slots=True)
class MaskTokens:
    """Ids hidden for a model to guess (BERT's masking): ``labels`` holds what they were, -100 elsewhere.

    Attributes
    ----------
    probability
        Of each token to be chosen.
    masked, replaced
        Share of the chosen that become the mask token, and that become a random id; the rest stay.
    replacement
        Random ids are uniform on ``[first, stop)``; None: the whole vocabulary, from 0.
    protect
        Tokens that are never chosen. Padding never is.
    """

    probability: float = 0.15
    masked: float = 0.8
    replaced: float = 0.1
    replacement: tuple[int, int] | None = None
    protect: tuple[Token, ...] = ()

    def __post_init__(self) -> None:
        for name in ("probability", "masked", "replaced"):
            _probability(name, getattr(self, name))
        if self.masked + self.replaced > 1 + 1e-12:
            raise ValueError(
                f"masked and replaced are shares of the chosen tokens, got {self.masked} + {self.replaced}"
            )
        if self.replacement is not None and not 0 <= self.replacement[0] < self.replacement[1] <= 2**31:
            raise ValueError(
                f"replacement must be ids [first, stop) with at least one id, got {self.replacement}"
            )
        _set(self, protect=tuple(self.protect))


@dataclass(frozen=True, slots=True)
class MaskValues:
    """Values hidden for a model to guess: adds ``masked_values``, and ``mask`` where they differ.

    Attributes
    ----------
    probability
        Of each value to be hidden; several: one of them for each cell, at random.
    value
        What hidden values become.
    exact
        Whether a cell hides ``floor(probability * n)`` of its n values instead of each by itself.
    protect_front
        Whether tokens in front of the genes stay visible.
    reference_mask_range
        Leave out as many genes at the end as there are tokens in front, as Tahoe-x1 1.0.0 does.
    """

    probability: float | tuple[float, ...] = 0.15
    value: float = -1.0
    exact: bool = False
    protect_front: bool = True
    reference_mask_range: bool = False

    def __post_init__(self) -> None:
        given = self.probability
        several = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not several:
            raise ValueError("probability needs at least one number")
        for one in several:
            _probability("probability", one)
        _set(self, probability=several)


@dataclass(frozen=True, slots=True)
class Split:
    """A cell cut in two sequences: genes to see (``input_ids``) and genes to generate (``gen_ids``).

    Attributes
    ----------
    ratios
        Share of the genes that are generated: one of these for each batch, at random.
    """

    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ValueError("ratios needs at least one number")
        for one in self.ratios:
            _probability("ratios", one)
        _set(self, ratios=tuple(self.ratios))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all recipes have in common.

    Attributes
    ----------
    vocabulary
        Feature uid -> token id: a dict, or the path of a JSON file or a published pickle. Genes of the
        dataset that it lacks are dropped. Special tokens stand in it by name where they are not given as ids.
    mapping
        Old feature uid -> new uid, for genes that were renamed; counts of one gene under several names are
        summed.
    strip_versions
        Compare feature uids without the version that Ensembl ids end with (``.12``).
    names
        Renames outputs: ours -> the model's own, such as ``{"input_ids": "gene", "values": "expr"}``.
    aux
        Further outputs from obs columns, by name: one :class:`ObsTokens` makes (n_rows,), a tuple of k
        makes (n_rows, k).
    """

    # Tables of thousands of genes are no help in a repr.
    vocabulary: Table = field(repr=False)
    _: KW_ONLY
    mapping: Table | None = field(default=None, repr=False)
    strip_versions: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    aux: Mapping[str, ObsTokens | tuple[ObsTokens, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read_common()

    def _read_common(self) -> None:
        _set(self, vocabulary=read_ids(self.vocabulary))
        if self.mapping is not None:
            mapping = read_table(self.mapping, "the mapping of renamed genes")
            _set(self, mapping={old: str(new) for old, new in mapping.items()})
        _set(self, names=dict(self.names or {}), aux=dict(self.aux or {}))
        _check_names(self.names, self.aux)

    def token_id(self, token: Token, role: str) -> int:
        """The id of a special token.

        Raises
        ------
        InvalidDataError
            The vocabulary lacks it.
        """
        if not isinstance(token, str):
            return int(token)
        vocabulary: Mapping[str, int] = self.vocabulary  # type: ignore[assignment]
        if token not in vocabulary:
            specials = [name for name in vocabulary if not name[:1].isalnum()][:8]
            raise InvalidDataError(
                f"{role}={token!r} is not in the vocabulary, whose special tokens seem to be "
                f"{', '.join(map(repr, specials)) or 'missing'}; give the token's name there, or its id"
            )
        return vocabulary[token]

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """Obs columns that the recipe reads."""
        found = [one.column for entry in self.aux.values() for one in _several(entry)]
        for entry in fields(self):
            value = getattr(self, entry.name)
            for one in value if isinstance(value, tuple) else ():
                token = one[0] if isinstance(one, tuple) and one else one
                if isinstance(token, ObsTokens):
                    found.append(token.column)
        return tuple(dict.fromkeys(found))


def _several(entry: ObsTokens | tuple[ObsTokens, ...]) -> tuple[ObsTokens, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


ARITHMETICS = ("f64_div", "f64_recip", "f32_recip", "f32_div", "f32_eps", "f32_factor")


@dataclass(frozen=True, slots=True)
class RankValue(Recipe):
    """Genes by falling ``count / total * target_sum / median``: Geneformer and its kin.

    Genes of one value come in ascending column.

    Attributes
    ----------
    medians
        Feature uid -> what its counts are divided by: a dict or a path, as `vocabulary`.
    length
        Tokens at most, special ones included.
    cls, eos
        Tokens before and after the genes; None: none.
    context
        Ids from obs columns, before the genes.
    pad, mask_token
        What fills rows up, and what hides ids.
    mlm
        Hide ids: a :class:`MaskTokens`, or the probability of one. None hides nothing.
    target_sum
        What a cell's counts are scaled to.
    arithmetic
        The rounding steps, which decide between nearly equal values: those of Geneformer's loom path
        (``"f64_div"``) or h5ad path (``"f64_recip"``), of helical (``"f32_recip"``), of BioNeMo
        (``"f32_div"``, over known genes only), of Cellarium (``"f32_eps"``), of Nicheformer
        (``"f32_factor"``).
    keep_counts
        Add ``values``: the scaled counts, 0 at special tokens.
    missing_medians
        A gene with a token and without a median is an ``"error"`` (default), or dropped (``"drop"``, which
        is the default if `medians` are statistics, because these lack the genes that no cell expresses).
    """

    medians: Table = field(kw_only=True, repr=False)
    length: int = field(default=4096, kw_only=True)
    cls: Token | None = field(default="<cls>", kw_only=True)
    eos: Token | None = field(default="<eos>", kw_only=True)
    context: tuple[ObsTokens, ...] = field(default=(), kw_only=True)
    pad: Token = field(default="<pad>", kw_only=True)
    mask_token: Token = field(default="<mask>", kw_only=True)
    mlm: MaskTokens | float | None = field(default=None, kw_only=True)
    target_sum: float = field(default=1e4, kw_only=True)
    arithmetic: str = field(default="f64_div", kw_only=True)
    keep_counts: bool = field(default=False, kw_only=True)
    missing_medians: Literal["error", "drop"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _one_of("arithmetic", self.arithmetic, ARITHMETICS)
        if self.missing_medians is None:
            _set(self, missing_medians="drop" if isinstance(self.medians, Statistics) else "error")
        _one_of("missing_medians", self.missing_medians, ("error", "drop"))
        _positive("target_sum", self.target_sum)
        mlm = MaskTokens(self.mlm) if isinstance(self.mlm, int | float) else self.mlm
        _set(self, medians=read_scales(self.medians, "medians"), mlm=mlm, context=tuple(self.context))
        n_special = len(self.context) + (self.cls is not None) + (self.eos is not None)
        _room(self.length, n_special)
        for role in ("cls", "eos", "pad") + (("mask_token",) if mlm else ()):
            if getattr(self, role) is not None:
                self.token_id(getattr(self, role), role)
        for token in mlm.protect if mlm else ():
            self.token_id(token, "protect")

    @classmethod
    def geneformer_v2(
        cls, vocabulary: Table, medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
    ) -> RankValue:
        """The recipe of Geneformer V2 (104M, 4,096 tokens): ``<cls>``, genes by rank value, ``<eos>``.

        Parameters
        ----------
        vocabulary, medians
            The published ``token_dictionary_gc104M.pkl`` and ``gene_median_dictionary_gc104M.pkl``, or dicts
            from feature uid to id and to median; `medians` may be the result of ``atlas.statistics()``.
        mlm
            Probability of hiding a token (published: 0.15), or a :class:`MaskTokens`; None: nothing is
            hidden.
        **options
            Other fields of this class.

        Returns
        -------
        RankValue
            The same as :func:`hbx_gpu.tokens.geneformer_v2` makes.
        """
        return cls(vocabulary, medians=medians, mlm=mlm, **options)

    @classmethod
    def geneformer_v1(
        cls, vocabulary: Table, medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
    ) -> RankValue:
        """The recipe of Geneformer V1 (30M, 2,048 tokens): genes by rank value, without special tokens.

        Parameters
        ----------
        vocabulary, medians, mlm
            As in :meth:`geneformer_v2`.
        **options
            Other fields of this class.

        Returns
        -------
        RankValue
            The same as :func:`hbx_gpu.tokens.geneformer_v1` makes.
        """
        chosen = {"length": 2048, "cls": None, "eos": None}
        return cls(vocabulary, medians=medians, mlm=mlm, **{**chosen, **options})


FrontToken: TypeAlias = "tuple[Token | ObsTokens, float]"


@dataclass(frozen=True, slots=True)
class QuantileBins(Recipe):
    """Genes with the quantile bin of their count within the cell: scGPT and Tahoe-x1.

    Attributes
    ----------
    side
        A count that equals several bin edges: a random bin between them (``"both"``, the package scgpt), the
        highest (``"one"``, scGPT's pretraining), or the lowest (``"left"``, Tahoe-x1).
    length
        Tokens at most, those in front included.
    bins
        Number of bins, that of zeros included.
    edges
        Arithmetic of the edges: ``"numpy"`` (float64) or ``"torch"`` (float32).
    values
        ``"bins"``, or ``"log1p"`` of counts scaled to `target_sum` over the cell's known genes.
    sampling
        Of cells with more genes than fit: a random choice, in random order; False: the first ones.
    front
        Tokens before the genes, each with its value.
    pad, pad_value
        What fills rows up.
    unexpressed
        Fill up to `length` with genes that the cell does not express, at random, with the value 0.
    zeros
        All genes of the vocabulary in each cell, expressed or not.
    mask
        Hide values (:class:`MaskValues`), or cut cells in two (:class:`Split`).
    keep_counts
        Add ``counts``: what was counted, `pad_value` at special tokens.
    """

    side: Literal["both", "one", "left"] | None = field(default=None, kw_only=True)
    length: int = field(default=1200, kw_only=True)
    bins: int = field(default=51, kw_only=True)
    edges: Literal["numpy", "torch"] = field(default="numpy", kw_only=True)
    values: Literal["bins", "log1p"] = field(default="bins", kw_only=True)
    target_sum: float = field(default=1e4, kw_only=True)
    sampling: bool = field(default=True, kw_only=True)
    front: tuple[FrontToken, ...] = field(default=(("<cls>", -2.0),), kw_only=True)
    pad: Token = field(default="<pad>", kw_only=True)
    pad_value: float = field(default=-2.0, kw_only=True)
    unexpressed: bool = field(default=False, kw_only=True)
    zeros: bool = field(default=False, kw_only=True)
    mask: MaskValues | Split | None = field(default=None, kw_only=True)
    keep_counts: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _one_of("values", self.values, ("bins", "log1p"))
        _one_of("edges", self.edges, ("numpy", "torch"))
        if self.values == "bins":
            if self.side is None:
                raise ValueError(
                    'side has no default, because published models differ: pass side="both" (the package '
                    "scgpt), "
                    '"one" (scGPT\'s pretraining) or "left" (Tahoe-x1)'
                )
            _one_of("side", self.side, ("both", "one", "left"))
        if not 3 <= self.bins <= 1024:
            raise ValueError(f"bins must be in 3 .. 1024, got {self.bins}")
        _positive("target_sum", self.target_sum)
        _set(self, front=tuple((token, float(value)) for token, value in self.front))
        _room(self.length, len(self.front))
        self.token_id(self.pad, "pad")
        for token, _value in self.front:
            if not isinstance(token, ObsTokens):
                self.token_id(token, "front")


@dataclass(frozen=True, slots=True)
class ExpressedGenes(Recipe):
    """A cell's genes with their counts: TranscriptFormer, scFoundation, scPRINT.

    Attributes
    ----------
    length
        Genes with counts at most.
    order
        ``"column"`` of the dataset, token ``"id"``, falling ``"value"`` (equal counts: ascending column), or
        ``"random"``.
    cut
        Of cells with more genes than fit: the ``"first"`` in that order, or ``"random"`` ones in random
        order.
    fill_to
        Fill up to so many genes with unexpressed ones, value 0: at random, or in ascending column where
        `fill_order` says ``"column"``. 0 fills nothing.
    zeros
        All genes of the vocabulary in each cell, expressed or not.
    scale
        Counts are divided by the sum over all genes (``"total"``), over the vocabulary (``"known"``) or over
        the genes that are kept (``"kept"``), times `target_sum`; None leaves them.
    curve
        Then ``"log1p"`` or ``"log2p1"``, which is ``log2(1 + x)``.
    clip
        Then values above this become this.
    bins
        Instead: quantile bins as scGPT's ``"one"`` makes them, over the genes that are kept; 0: none.
    depth
        scFoundation's two tokens at the end: their ids, and how the first is made (``"t4"`` = 4,
        ``"a5"`` = log10 of the total + 5, ``"f2"`` = log10 of the total times 2).
    reference_drop
        Leave out a depth token whose value is 0, as scFoundation does.
    pad, pad_value
        What fills rows up.
    """

    length: int = field(kw_only=True)
    order: Literal["column", "id", "value", "random"] = field(default="column", kw_only=True)
    cut: Literal["first", "random"] = field(default="first", kw_only=True)
    fill_to: int = field(default=0, kw_only=True)
    fill_order: Literal["random", "column"] = field(default="random", kw_only=True)
    zeros: bool = field(default=False, kw_only=True)
    scale: Literal["total", "known", "kept"] | None = field(default=None, kw_only=True)
    target_sum: float = field(default=1e4, kw_only=True)
    curve: Literal["log1p", "log2p1"] | None = field(default=None, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    bins: int = field(default=0, kw_only=True)
    depth: tuple[int, int, str] | None = field(default=None, kw_only=True)
    reference_drop: bool = field(default=False, kw_only=True)
    pad: Token = field(default="<pad>", kw_only=True)
    pad_value: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self._read_common()
        _one_of("order", self.order, ("column", "id", "value", "random"))
        _one_of("cut", self.cut, ("first", "random"))
        _one_of("fill_order", self.fill_order, ("random", "column"))
        if self.scale is not None:
            _one_of("scale", self.scale, ("total", "known", "kept"))
        if self.curve is not None:
            _one_of("curve", self.curve, ("log1p", "log2p1"))
        _positive("target_sum", self.target_sum)
        if self.clip is not None:
            _positive("clip", self.clip)
        if self.bins and not 3 <= self.bins <= 1024:
            raise ValueError(f"bins must be 0 (none) or in 3 .. 1024, got {self.bins}")
        _room(self.length, 0)
        self.token_id(self.pad, "pad")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and value < float("inf")):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _room(length: int, n_special: int) -> None:
    if not isinstance(length, int | np.integer):
        raise ValueError(f"length and samples must be whole numbers, got {length!r}")
    if length <= n_special or length < 1:
        raise ValueError(
            f"length={length} leaves no room for genes beside {n_special} special tokens; length counts both"
        )
