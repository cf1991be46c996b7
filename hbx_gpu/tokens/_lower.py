"""Recipes of sequences lowered to programs: names become ids, choices become numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

import numpy as np

from hbx_gpu.tokens import _program as p
from hbx_gpu.tokens._recipes import ExpressedGenes, MaskValues, ObsTokens, QuantileBins, RankValue, Split

Lowered = tuple[p.Program, "tuple[int | ObsTokens, ...]", "tuple[int, ...]"]


@singledispatch
def lower(recipe: object, names: list[str], tables: p.Tables) -> Lowered:  # noqa: ARG001
    """The program of a recipe, and its special tokens before and after the genes."""
    raise TypeError(
        f"tokens must be one of the recipes of hbx_gpu.tokens, such as tokens.geneformer_v2(...), got a "
        f"{type(recipe).__name__}"
    )


_RANK = {
    "f64_div": p.Norm.F64_DIV,
    "f64_recip": p.Norm.F64_RECIP,
    "f32_recip": p.Norm.F32_RECIP,
    "f32_div": p.Norm.F32_DIV,
    "f32_eps": p.Norm.F32_EPS,
    "f32_factor": p.Norm.F32_FACTOR,
}


@lower.register(RankValue)
def _(recipe: RankValue, names: list[str], tables: p.Tables) -> Lowered:  # noqa: ARG001
    front: tuple[int | ObsTokens, ...] = recipe.context
    if recipe.cls is not None:
        front = (recipe.token_id(recipe.cls, "cls"), *front)
    back = () if recipe.eos is None else (recipe.token_id(recipe.eos, "eos"),)
    norm = _RANK[recipe.arithmetic]
    program = p.Sequence(
        length=recipe.length,
        order=p.Order.VALUE,
        keep=recipe.length - len(front) - len(back),
        rank=norm,
        rank_target=recipe.target_sum,
        scaled=True,
        value=p.Value.SCALED if recipe.keep_counts else p.Value.NONE,
        norm=norm,
        target=recipe.target_sum,
        front_values=np.zeros(len(front), np.float32),
        back_values=np.zeros(len(back), np.float32),
        pad_id=recipe.token_id(recipe.pad, "pad"),
    )
    if mlm := recipe.mlm:
        assert not isinstance(mlm, float)
        vocabulary: dict[str, int] = recipe.vocabulary  # type: ignore[assignment]
        first, stop = mlm.replacement or (0, max(vocabulary.values()) + 1)
        program = replace(
            program,
            mask=p.Mask.TOKENS,
            ratios=np.array([mlm.probability]),
            mask_id=recipe.token_id(recipe.mask_token, "mask_token"),
            masked=mlm.masked,
            replaced=mlm.masked + mlm.replaced,
            replace_first=first,
            replace_span=stop - first,
            protect=np.array([recipe.token_id(token, "protect") for token in mlm.protect], np.int64),
        )
    return program, front, back


@lower.register(QuantileBins)
def _(recipe: QuantileBins, names: list[str], tables: p.Tables) -> Lowered:  # noqa: ARG001
    front = tuple(
        token if isinstance(token, ObsTokens) else recipe.token_id(token, "front")
        for token, _ in recipe.front
    )
    bins = recipe.values == "bins"
    keep = recipe.length - len(front)
    program = p.Sequence(
        length=recipe.length,
        keep=keep,
        cut_random=recipe.sampling,
        fill=p.Fill.RANDOM if recipe.unexpressed else p.Fill.NONE,
        fill_to=keep if recipe.unexpressed else 0,
        zeros=recipe.zeros,
        value=p.Value.BINS if bins else p.Value.SCALED,
        norm=p.Norm.COUNT if bins else p.Norm.F32_KNOWN_EPS,
        target=recipe.target_sum,
        curve=p.Curve.NONE if bins else p.Curve.LOG1P,
        bins=recipe.bins,
        side=p.Side[recipe.side.upper()] if recipe.side else p.Side.ONE,
        torch_edges=recipe.edges == "torch",
        counts=recipe.keep_counts,
        front_values=np.array([value for _, value in recipe.front], np.float32),
        pad_id=recipe.token_id(recipe.pad, "pad"),
        pad_value=recipe.pad_value,
    )
    if isinstance(recipe.mask, Split):
        program = replace(program, mask=p.Mask.SPLIT, ratios=np.array(recipe.mask.ratios))
    elif isinstance(recipe.mask, MaskValues):
        program = replace(
            program,
            mask=p.Mask.EXACT if recipe.mask.exact else p.Mask.BERNOULLI,
            ratios=np.array(recipe.mask.probability),
            mask_value=recipe.mask.value,
            mask_front=not recipe.mask.protect_front,
            mask_short=recipe.mask.reference_mask_range,
        )
    return program, front, ()


_SCALES = {None: p.Norm.COUNT, "total": p.Norm.F32_TIMES, "known": p.Norm.F64_KNOWN, "kept": p.Norm.F32_KEPT}
_DEPTHS: dict[str, Callable[[float], tuple[p.Depth, float]]] = {
    "t": lambda number: (p.Depth.CONSTANT, number),
    "a": lambda number: (p.Depth.ADDED, number),
    "f": lambda number: (p.Depth.TIMES, number),
}


@lower.register(ExpressedGenes)
def _(recipe: ExpressedGenes, names: list[str], tables: p.Tables) -> Lowered:  # noqa: ARG001
    fill = p.Fill.NONE
    if recipe.fill_to:
        fill = p.Fill.RANDOM if recipe.fill_order == "random" else p.Fill.COLUMN
    most = max(recipe.length, recipe.fill_to) + 2 * (recipe.depth is not None)
    program = p.Sequence(
        length=most,
        order=p.Order[recipe.order.upper()],
        keep=recipe.length,
        cut_random=recipe.cut == "random",
        fill=fill,
        fill_to=recipe.fill_to,
        zeros=recipe.zeros,
        value=p.Value.KEPT_BINS if recipe.bins else p.Value.SCALED,
        norm=_SCALES[recipe.scale],
        target=recipe.target_sum,
        curve=p.Curve[recipe.curve.upper()] if recipe.curve else p.Curve.NONE,
        clip=recipe.clip if recipe.clip is not None else float("inf"),
        bins=recipe.bins or 51,
        pad_id=recipe.token_id(recipe.pad, "pad"),
        pad_value=recipe.pad_value,
    )
    if recipe.depth is not None:
        first, second, resolution = recipe.depth
        kind, number = _DEPTHS[resolution[:1]](float(resolution[1:]))
        program = replace(
            program,
            depth=kind,
            depth_number=number,
            depth_ids=(first, second),
            depth_drop=recipe.reference_drop,
        )
    return program, (), ()
