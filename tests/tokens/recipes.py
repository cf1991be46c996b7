"""A recipe of every kind over a hundred genes, and rows of every shape for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hbx_gpu import SparseBatch, tokens

N = 97
GENES = [f"g{i}" for i in range(N)]
SPECIALS = {"<pad>": 0, "<cls>": 1, "<eos>": 2, "<mask>": 3}
VOCABULARY = {gene: 10 + (i * 31) % N for i, gene in enumerate(GENES) if i % 7} | SPECIALS
MEDIANS = {gene: [0.5, 1.0, 1.7, 2.0, 3.3][i % 5] for i, gene in enumerate(GENES)}
MAPPING = {"g0": "g1", "g7": "g3"}  # renamed genes, which are summed
CONTEXT = (tokens.ObsTokens("species", {0: 7, 1: 8}),)


def rank(**options: Any) -> tokens.RankValue:
    return tokens.geneformer_v2(VOCABULARY, MEDIANS, **options)


def expressed(**options: Any) -> tokens.ExpressedGenes:
    return tokens.ExpressedGenes(VOCABULARY, **({"length": 30} | options))


RECIPES: dict[str, tokens.Recipe] = {
    **{f"rank {name}": rank(arithmetic=name, length=40, keep_counts=True) for name in (
        "f64_div", "f64_recip", "f32_recip", "f32_div", "f32_eps", "f32_factor"
    )},
    "rank, hidden": rank(mlm=tokens.MaskTokens(0.3, 0.5, 0.3, protect=("<cls>",)), mapping=MAPPING),
    "rank, context": rank(context=CONTEXT, length=9),
    "bins one": tokens.scgpt(VOCABULARY, side="one", length=50, mask=0.4, keep_counts=True),
    "bins both": tokens.scgpt(VOCABULARY, side="both", length=20, bins=7, mapping=MAPPING),
    "bins all": tokens.scgpt(
        VOCABULARY, side="both", length=101, zeros=True,
        mask=tokens.MaskValues((0.2, 0.6), exact=True, protect_front=False),
    ),
    "split": tokens.scgpt(VOCABULARY, side="one", length=30, mask=tokens.Split((0.3, 0.7))),
    "tahoe": tokens.tahoe_x1(VOCABULARY, length=40, mask=0.5, unexpressed=True),
    "tahoe log": tokens.tahoe_x1(VOCABULARY, length=40, values="log1p", sampling=False),
    "expressed": expressed(clip=5.0),
    "expressed random": expressed(order="random", fill_to=45, scale="kept"),
    "expressed value": expressed(
        order="value", scale="total", curve="log2p1", fill_to=90, fill_order="column"
    ),
    "expressed cut": expressed(cut="random", length=10, bins=11),
    "foundation": tokens.scfoundation(GENES[5:80], resolution="a5"),
    "foundation f": tokens.scfoundation(GENES[5:80], resolution="f2", reference_drop=True),
    "uce": tokens.uce(
        {gene: i for i, gene in enumerate(GENES)}, {gene: i % 5 for i, gene in enumerate(GENES)},
        {gene: i * 13 % 50 for i, gene in enumerate(GENES)}, samples=40, length=60,
    ),
    "state": tokens.state_se(VOCABULARY, length=24, tasks=(7, 6, 5)),
    # More genes to predict than a row has: both draws are with replacement.
    "state tasks": tokens.state_se(VOCABULARY, length=90, tasks=(10, 110, 5)),
    "state log": tokens.state_se(
        VOCABULARY, values="log1p", length=150, tasks=(70, 90, 5), reference_unexpressed=True, n_ids=300
    ),
    "gpt": tokens.cellarium_gpt(GENES, length=30, min_umis=5.0, max_umis=50.0, metadata=CONTEXT),
    "gpt predict": tokens.cellarium_gpt(
        GENES, length=60, predict=True, queries=frozenset(GENES[3:50]), metadata=CONTEXT
    ),
}  # fmt: skip


COMPILED = {name: tokens.compile(recipe, GENES) for name, recipe in RECIPES.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name in a:
        left, right = np.asarray(a[name]), np.asarray(b[name])
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        assert left.tobytes() == right.tobytes(), name


COUNTS = (0, 1, 1, 1, 2, 2, 3, 17, 200, 4095, 4096, 5000)


def odd_rows(seed: int, *, small: bool = False, in_order: bool = False) -> SparseBatch:
    """Rows of 0, 1 and more genes, with zeros, repeats, ties and, unless `small`, huge counts."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in (0, 1, 5, 40, 90, N, 30):
        columns = rng.integers(0, N, n)
        if in_order:
            columns = np.unique(columns)
        counts = rng.choice(COUNTS[:9] if small else COUNTS, len(columns)).astype(np.float64)
        if not small and len(counts) > 30:
            counts[2] = 2.0**40
        rows.append((columns, counts))
    offsets = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns, counts = (np.concatenate(part) for part in zip(*rows, strict=True))
    numbers = rng.integers(0, 2**40, len(rows))
    return SparseBatch(columns.astype(np.int32), counts, offsets, N, {"index": numbers})
