"""What is drawn: known answers on every engine, the same in every batch, order and panel, and evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu import tokens
from hbx_gpu._draws import philox
from hbx_gpu.tokens._draws import Draws, Step, mulhi, smallest
from tests.tokens.fixtures import Tokens, ragged, unpadded


def vocabulary(small: Tokens, known: np.ndarray) -> dict[str, int]:
    """Ids are columns + 4, as in the known answers."""
    found = {small.genes[c]: c + 4 for c in np.flatnonzero(known).tolist()}
    return {**found, "<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


def native(small: Tokens, recipe: Any, engine: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    z = small.load("native")
    cells = int(z["first_cell"]) + np.arange(small.counts.shape[0])
    batch = tokens.encode(
        small.counts,
        recipe(vocabulary(small, z["known_gene"])),
        small.genes,
        seed=int(z["seed"]),
        epoch=int(z["epoch"]),
        cells=cells,
        engine=engine,
    )
    return z, batch


def test_words(small: Tokens) -> None:
    z = small.load("native")
    for answer in z["philox_known_answers"].astype(np.uint64):
        found = philox(answer[:4, None], (int(answer[4]), int(answer[5])))
        assert found[:, 0].tolist() == answer[6:].tolist()
    draws = Draws(int(z["seed"]), int(z["epoch"]), int(z["first_cell"]))
    words = draws.words(Step.PICK, np.arange(8))
    assert np.array_equal(words.T, z["words_cell_base_step_pick_columns_0_7"])


def test_choices_and_orders(small: Tokens, engine: str) -> None:
    def recipe(words: dict[str, int]) -> tokens.ExpressedGenes:
        return tokens.ExpressedGenes(words, length=64, order="random", fill_to=64)

    z, batch = native(small, recipe, engine)
    picked = ragged(z["pick64"], z["pick64_ptr"])
    zeros = ragged(z["zeros_to_64"], z["zeros_to_64_ptr"])
    for ids, values, a, b in zip(unpadded(batch), batch["values"], picked, zeros, strict=True):
        assert (ids[: len(a)] - 4).tolist() == a.tolist()
        assert (ids[len(a) :] - 4).tolist() == b.tolist()
        assert (values[: len(a)] > 0).all()
        assert not values[len(a) :].any()


def test_bins(small: Tokens, engine: str) -> None:
    z, batch = native(small, lambda words: tokens.scgpt(words, side="both", length=601, front=()), engine)
    assert np.array_equal(np.concatenate(unpadded(batch, "values")), z["bin51"])


@pytest.mark.parametrize(("exact", "share"), [(True, 0.4), (False, 0.15)])
def test_masks(small: Tokens, engine: str, exact: bool, share: float) -> None:
    mask = tokens.MaskValues(share, exact=exact)
    z, batch = native(small, lambda words: tokens.scgpt(words, side="one", length=601, mask=mask), engine)
    name = f"mask_{'exact' if exact else 'bernoulli'}_{share}"
    found = np.concatenate([row[1:] for row in unpadded(batch, "mask")])
    assert np.array_equal(found, z[name])


def test_hidden_ids(small: Tokens, engine: str) -> None:
    mlm = tokens.MaskTokens(0.15, replacement=(4, 4 + len(small.genes)))

    def recipe(words: dict[str, int]) -> tokens.RankValue:
        medians = dict.fromkeys(small.genes, 1.0)
        return tokens.RankValue(words, medians=medians, length=602, mlm=mlm)

    z, batch = native(small, recipe, engine)
    for i, (ids, labels) in enumerate(
        zip(
            ragged(z["mlm_input_ids"], z["mlm_input_ids_ptr"]),
            ragged(z["mlm_labels"], z["mlm_labels_ptr"]),
            strict=True,
        )
    ):
        length = batch["lengths"][i]
        ours = batch["input_ids"][i][1 : length - 1], batch["labels"][i][1 : length - 1]
        one = small.counts[i]
        columns = one.indices[z["known_gene"][one.indices]]
        # Theirs are in column order, ours ranked: what a gene draws depends on neither.
        order = np.argsort(-one.data[z["known_gene"][one.indices]], kind="stable")
        assert len(columns) == len(ids)
        assert ours[0].tolist() == ids[order].tolist()
        assert ours[1].tolist() == labels[order].tolist()


def test_draws_depend_on_cell_and_gene_only(small: Tokens, engine: str) -> None:
    z = small.load("native")
    words = vocabulary(small, z["known_gene"])
    recipe = tokens.scgpt(words, side="both", length=100, mask=0.3)
    cells = np.arange(len(small.genes))[: small.counts.shape[0]] * 7

    def rows(numbers: np.ndarray, **options: Any) -> list[tuple[Any, ...]]:
        batch = tokens.encode(
            small.counts[numbers], recipe, small.genes, 3, 1, cells[numbers], engine=engine, **options
        )
        return [
            tuple(batch[name][i][:n].tolist() for name in ("input_ids", "values", "mask"))
            for i, n in enumerate(batch["lengths"])
        ]

    whole = rows(np.arange(20))
    assert rows(np.arange(20)[::-1], padding="max_length")[::-1] == whole
    assert [rows(np.array([i]))[0] for i in range(20)] == whole
    # A panel has other columns, and the same genes.
    order = np.random.default_rng(0).permutation(len(small.genes))
    panel = tokens.compile(recipe, [small.genes[c] for c in order], columns=order)
    batch = tokens.encode(small.counts[:20][:, order], panel, None, 3, 1, cells[:20], engine=engine)
    for i, (ids, values, mask) in enumerate(whole):
        n = batch["lengths"][i]
        ours = {
            int(g): (v, m)
            for g, v, m in zip(
                batch["input_ids"][i][:n], batch["values"][i][:n], batch["mask"][i][:n], strict=True
            )
        }
        assert ours == {g: (v, m) for g, v, m in zip(ids, values, mask, strict=True)}


def test_numbers_spread_evenly() -> None:
    """Each gene is chosen as often, and each bin hit as often (chi-square well below its 0.1 % point)."""
    chosen = np.zeros(200)
    index = np.arange(200)
    for cell in range(2000):
        chosen[smallest(Draws(1, 0, cell).keys(Step.PICK, index), index, 50)] += 1
    expected = 2000 * 0.25
    assert ((chosen - expected) ** 2 / (expected * 0.75)).sum() < 267  # 199 degrees of freedom
    keys = Draws(1, 0, 5).keys(Step.WEIGHTED, np.arange(20_000))
    hits = np.bincount(mulhi(keys, 20).astype(int), minlength=20)
    assert ((hits - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom
    assert [int(v) for v in mulhi(keys[:50], 2**60 + 12345)] == [
        int(k) * (2**60 + 12345) >> 64 for k in keys[:50]
    ]
