"""Recipes of published models by name; docs/tokens.md says what each is equal to, and where it differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from hbx_gpu.tokens._recipes import (
    ExpressedGenes,
    MaskTokens,
    MaskValues,
    ObsTokens,
    QuantileBins,
    RankValue,
    Split,
    Token,
)
from hbx_gpu.tokens._sampled import GeneSentence, PromptQuery, WeightedSentence
from hbx_gpu.tokens._tables import Table, read_table


def geneformer_v2(
    vocabulary: Table, medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
) -> RankValue:
    """Geneformer V2 (104M, 4,096 tokens): ``<cls>``, genes by rank value, ``<eos>``.

    Parameters
    ----------
    vocabulary, medians
        The published ``token_dictionary_gc104M.pkl`` and ``gene_median_dictionary_gc104M.pkl``, or dicts.
    mlm
        Probability of hiding a token (published: 0.15), or a :class:`MaskTokens`; None: nothing is hidden.
    **options
        Other fields of :class:`RankValue`.

    Returns
    -------
    RankValue
        The recipe.
    """
    return RankValue.geneformer_v2(vocabulary, medians, mlm=mlm, **options)


def geneformer_v1(
    vocabulary: Table, medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
) -> RankValue:
    """Geneformer V1 (30M, 2,048 tokens): genes by rank value, without special tokens.

    Parameters
    ----------
    vocabulary, medians, mlm, **options
        As in :func:`geneformer_v2`.

    Returns
    -------
    RankValue
        The recipe.
    """
    return RankValue.geneformer_v1(vocabulary, medians, mlm=mlm, **options)


def bionemo_geneformer(
    vocabulary: Table, medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
) -> RankValue:
    """BioNeMo's Geneformer (2,048 tokens): ``[CLS]``, genes by float32 rank value over known genes.

    Parameters
    ----------
    vocabulary
        Gene -> id, with ``[CLS]``, ``[MASK]`` and ``[PAD]``; genes follow from 5.
    medians
        Feature uid -> median.
    mlm
        Probability of hiding a gene (published: 0.15). ``[CLS]`` is never hidden, random ids are genes.
    **options
        Fields of :class:`RankValue`.
    """
    chosen = {
        "length": 2048,
        "cls": "[CLS]",
        "eos": None,
        "pad": "[PAD]",
        "mask_token": "[MASK]",
        "arithmetic": "f32_div",
    }
    made = RankValue(vocabulary, medians=medians, **{**chosen, **options})
    if not isinstance(mlm, int | float):
        return made if mlm is None else _with(made, mlm=mlm)
    stop = max(made.vocabulary.values()) + 1  # type: ignore[union-attr]
    cls = () if made.cls is None else (made.cls,)
    return _with(made, mlm=MaskTokens(mlm, replacement=(5, stop), protect=cls))


def cellarium_geneformer(
    genes: Sequence[str], medians: Table, *, mlm: MaskTokens | float | None = None, **options: Any
) -> RankValue:
    """Cellarium's Geneformer (2,048 tokens): position in the gene list + 2, 0 pads, 1 hides.

    Parameters
    ----------
    genes
        The model's genes in order.
    medians
        Feature uid -> what its counts are divided by.
    mlm
        Probability of hiding a gene; random ids are genes, which those of cellarium-ml 0.0.15 are not all.
    **options
        Fields of :class:`RankValue`.
    """
    chosen = {
        "length": min(len(genes), 2048),
        "cls": None,
        "eos": None,
        "pad": 0,
        "mask_token": 1,
        "arithmetic": "f32_eps",
    }
    if isinstance(mlm, int | float):
        mlm = MaskTokens(mlm, replacement=(2, len(genes) + 2))
    return RankValue(_numbered(genes, 2), medians=medians, mlm=mlm, **{**chosen, **options})


def nicheformer(
    genes: Sequence[str],
    technology_mean: Table,
    *,
    context: Sequence[ObsTokens] = (),
    mlm: MaskTokens | float | None = None,
    **options: Any,
) -> RankValue:
    """Nicheformer (1,500 tokens): ids from obs columns, then genes by count over the technology's mean.

    Parameters
    ----------
    genes
        The model's genes in order; ids are positions + 30.
    technology_mean
        Feature uid -> mean of the technology; a gene whose mean is 0 counts as 1, as published.
    context
        Species, assay and modality as ids, in this order.
    mlm
        Probability of hiding a token (published: 0.15): 81 % become 0, 10 % a random id of 10 .. 20,339.
    **options
        Fields of :class:`RankValue`.
    """
    table = read_table(technology_mean, "technology_mean")
    means = {gene: 1.0 if not table.get(gene, 1.0) else table.get(gene, 1.0) for gene in genes}
    if isinstance(mlm, int | float):
        mlm = MaskTokens(mlm, 0.81, 0.1, replacement=(10, 20_340), protect=(1, 3))
    chosen = {
        "length": 1500,
        "cls": None,
        "eos": None,
        "pad": 1,
        "mask_token": 0,
        "arithmetic": "f32_factor",
        "context": tuple(context),
    }
    return RankValue(_numbered(genes, 30), medians=means, mlm=mlm, **{**chosen, **options})


def scgpt(
    vocabulary: Table,
    *,
    side: Literal["both", "one"],
    length: int = 1200,
    mask: MaskValues | Split | float | None = None,
    **options: Any,
) -> QuantileBins:
    """scGPT: ``<cls>``, then a cell's genes with quantile bins of their counts.

    Parameters
    ----------
    vocabulary
        The published ``vocab.json``, or a dict, with ``<cls>`` and ``<pad>``.
    side
        ``"both"``: bins as the package scgpt makes them, partly at random; ``"one"``: as in pretraining.
    length
        Tokens at most: 1,200 for embedding, 1,536 in pretraining.
    mask
        Probability of hiding a value, a :class:`MaskValues`, or a :class:`Split`.
    **options
        Fields of :class:`QuantileBins`.
    """
    if isinstance(mask, int | float):
        mask = MaskValues(mask)
    return QuantileBins(vocabulary, side=side, length=length, mask=mask, **options)


def tahoe_x1(
    vocabulary: Table,
    *,
    length: int = 1024,
    mask: MaskValues | float | tuple[float, ...] | None = None,
    drug: ObsTokens | None = None,
    drug_token: Token = "<drug>",
    **options: Any,
) -> QuantileBins:
    """Tahoe-x1: ``<cls>``, then a cell's genes with float32 quantile bins, and the counts beside them.

    Parameters
    ----------
    vocabulary
        Gene -> id, with ``<cls>`` and ``<pad>``.
    length
        Tokens at most: 1,024 or 2,048.
    mask
        Share of the values to hide (published: 0.5), several to draw one for each cell, or a
        :class:`MaskValues`.
    drug
        Ids of the drugs: adds ``<drug>`` in second place, and ``drug_ids``.
    drug_token
        Name or id of that token.
    **options
        Fields of :class:`QuantileBins`.
    """
    if isinstance(mask, int | float | tuple):
        mask = MaskValues(mask, exact=True)
    front: tuple[tuple[Token, float], ...] = (("<cls>", -2.0),)
    if drug is not None:
        front = (*front, (drug_token, -2.0))
        options = {"aux": {"drug_ids": drug}, **options}
    chosen = {"side": "left", "edges": "torch", "keep_counts": True, "front": front}
    return QuantileBins(vocabulary, length=length, mask=mask, **{**chosen, **options})


def transcriptformer(
    vocabulary: Table,
    *,
    length: int = 2047,
    order: Literal["column", "random", "value"] = "column",
    clip: float | None = 30.0,
    normalize_to: float | None = None,
    pad_zeros: bool = True,
    assay: ObsTokens | Sequence[ObsTokens] = (),
    pad: Token = "[PAD]",
    **options: Any,
) -> ExpressedGenes:
    """TranscriptFormer: genes with their counts, no more than 30.

    Parameters
    ----------
    vocabulary
        Gene -> id, with ``[PAD]``.
    length
        Genes at most.
    order
        Of the genes: long cells lose their last ones, so ``"random"`` treats all columns alike.
    clip
        Highest count; None: none.
    normalize_to
        What counts of the genes that are kept are scaled to, before clipping.
    pad_zeros
        False fills rows up with unexpressed genes.
    assay
        Obs columns as ``aux_token_indices`` (n_rows, k).
    pad
        What fills rows up.
    **options
        Fields of :class:`ExpressedGenes`.
    """
    aux = (assay,) if isinstance(assay, ObsTokens) else tuple(assay)
    chosen: dict[str, Any] = {"aux": {"aux_token_indices": aux} if aux else {}}
    if normalize_to is not None:
        chosen |= {"scale": "kept", "target_sum": normalize_to}
    if not pad_zeros:
        chosen |= {"fill_to": length, "fill_order": "random" if order == "random" else "column"}
    return ExpressedGenes(vocabulary, length=length, order=order, clip=clip, pad=pad, **{**chosen, **options})


def scfoundation(
    genes: Sequence[str], *, resolution: str = "t4", pad_id: int = 103, **options: Any
) -> ExpressedGenes:
    """scFoundation's encoder: expressed genes with logarithms of their scaled counts, and two depth tokens.

    Parameters
    ----------
    genes
        The model's 19,264 genes in order; ids are positions.
    resolution
        ``"t4"``: aim at a depth of 10**4; ``"a5"``: 10**5 times the cell's own; ``"f2"``: twice its own.
    pad_id
        What fills ids and values up.
    **options
        Fields of :class:`ExpressedGenes`.
    """
    if resolution[:1] not in "taf" or not resolution[1:].replace(".", "", 1).isdigit():
        raise ValueError(
            f"resolution must be t, a or f and a number, such as 't4', 'a5' or 'f2', got {resolution!r}"
        )
    chosen = {
        "length": len(genes),
        "order": "id",
        "scale": "known",
        "curve": "log1p",
        "pad": pad_id,
        "pad_value": float(pad_id),
        "depth": (len(genes), len(genes) + 1, resolution),
    }
    return ExpressedGenes(_numbered(genes, 0), **{**chosen, **options})


def scprint(
    vocabulary: Table,
    *,
    max_len: int = 2200,
    how: Literal["random expr", "most expr", "all"] = "random expr",
    add_zero_genes: int = 0,
    norm_to: float | None = None,
    logp1: bool = False,
    n_bins: int = 0,
    **options: Any,
) -> ExpressedGenes:
    """scPRINT and scPRINT-2: expressed genes with their counts, filled up with unexpressed ones.

    Parameters
    ----------
    vocabulary
        Gene -> position among the model's genes.
    max_len
        Genes: 2,200 for scPRINT, 3,200 for scPRINT-2.
    how
        ``"random expr"``: expressed genes at random; ``"most expr"``: the highest counts; ``"all"`` genes.
    add_zero_genes
        Unexpressed genes beyond `max_len`.
    norm_to
        What a cell's counts are scaled to.
    logp1
        Then ``log2(1 + x)``: so it is in the package, whatever its name says.
    n_bins
        Instead: quantile bins; 0: none.
    **options
        Fields of :class:`ExpressedGenes`.
    """
    chosen: dict[str, Any] = {
        "length": max_len,
        "order": "value" if how == "most expr" else "column",
        "cut": "random" if how == "random expr" else "first",
        "fill_to": max_len + add_zero_genes,
        "pad": 0,
        "bins": n_bins,
        "curve": "log2p1" if logp1 else None,
    }
    if how == "all":
        table = read_table(vocabulary, "the vocabulary")
        vocabulary = table
        chosen |= {"length": len(table), "fill_to": 0, "zeros": True, "order": "column"}
    if norm_to is not None:
        chosen |= {"scale": "total", "target_sum": norm_to}
    return ExpressedGenes(vocabulary, **{**chosen, **options})


def uce(vocabulary: Table, chromosomes: Table, starts: Table, **options: Any) -> WeightedSentence:
    """UCE: 1,024 genes drawn by their logarithms, chromosome by chromosome.

    Parameters
    ----------
    vocabulary
        Gene -> index of its protein embedding.
    chromosomes, starts
        Gene -> code of its chromosome among those of all species, and start position.
    **options
        Fields of :class:`WeightedSentence`.
    """
    return WeightedSentence(vocabulary, chromosomes=chromosomes, starts=starts, **options)


def state_se(
    vocabulary: Table, *, values: Literal["counts", "log1p"] = "counts", **options: Any
) -> GeneSentence:
    """State's embedding model (SE): the 2,047 highest genes, and genes to predict.

    Parameters
    ----------
    vocabulary
        Gene -> row of the model's embedding table, for genes that the model knows.
    values
        What rows hold; arc-state guesses it, and takes counts of shallow cells for logarithms.
    **options
        Fields of :class:`GeneSentence`.
    """
    return GeneSentence(vocabulary, values=values, **options)


def cellarium_gpt(
    genes: Sequence[str], *, length: int, metadata: Sequence[ObsTokens] = (), **options: Any
) -> PromptQuery:
    """CellariumGPT: random genes, some with their counts and some to guess them.

    Parameters
    ----------
    genes
        The model's genes in order; ids are positions.
    length
        The context: genes and metadata.
    metadata
        Obs columns as ids.
    **options
        Fields of :class:`PromptQuery`; ``predict=True`` for inference.
    """
    return PromptQuery(_numbered(genes, 0), length=length, metadata=tuple(metadata), **options)


def _numbered(genes: Sequence[str], first: int) -> dict[str, int]:
    """Ids by position; a gene that the list names twice is refused."""
    ids: dict[str, int] = {}
    for position, gene in enumerate(genes):
        if gene in ids:
            raise ValueError(f"genes: {gene!r} stands in the list twice")
        ids[gene] = position + first
    return ids


def _with(recipe: RankValue, mlm: MaskTokens | None) -> RankValue:
    return replace(recipe, mlm=mlm)
