"""The host engine makes the bits of the reference: on rows of every shape, stored in any order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from hbx_gpu import SparseBatch, tokens
from tests.tokens.recipes import COMPILED, MEDIANS, RECIPES, SPECIALS, VOCABULARY, N, rank, same
from tests.tokens.rows import batches


def both(batch: SparseBatch, name: str, **options: Any) -> dict[str, np.ndarray]:
    compiled = COMPILED[name]
    obs = {"species": np.arange(len(batch)) % 2}
    made = [
        tokens.encode(batch, compiled, None, 11, 4, obs=obs, engine=engine, **options)
        for engine in ("host", "reference")
    ]
    same(*made)
    return made[0]


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=batches(), padding=st.sampled_from(["longest", "max_length", "packed"]))
def test_host_makes_the_bits_of_the_reference(name: str, batch: SparseBatch, padding: str) -> None:
    if name == "split" and padding == "packed":
        padding = "longest"
    if name in ("gpt", "state log"):  # a draw for every four counts; logarithms that sum exactly
        batch = replace(batch, values=np.minimum(batch.values, 300))
    made = both(batch, name, padding=padding)
    assert len(made["lengths"]) == len(batch)


def wide(n: int, nnz: list[int], seed: int = 0) -> tuple[list[str], csr_matrix]:
    rng = np.random.default_rng(seed)
    columns = [np.sort(rng.choice(n, k, replace=False)) for k in nnz]
    values = [rng.integers(1, 3 if k % 2 else 3000, k) for k in nnz]
    offsets = np.cumsum([0, *nnz])
    shape = (len(nnz), n)
    return [f"g{i}" for i in range(n)], csr_matrix(
        (np.concatenate(values).astype(np.float32), np.concatenate(columns).astype(np.int32), offsets), shape
    )


@pytest.mark.parametrize("nnz", [0, 1, 20_000, 69_999])
def test_rows_of_any_length(nnz: int) -> None:
    genes, rows = wide(70_000, [nnz])
    words = {gene: i + 4 for i, gene in enumerate(genes)} | SPECIALS
    recipes = [
        tokens.geneformer_v2(words, dict.fromkeys(genes, 1.5), mlm=0.15),
        tokens.scgpt(words, side="both", mask=tokens.MaskValues(0.4, exact=True)),
        tokens.ExpressedGenes(words, length=500, order="value", fill_to=600),
    ]
    for recipe in recipes:
        compiled = tokens.compile(recipe, genes)
        same(*(tokens.encode(rows, compiled, engine=engine) for engine in ("host", "reference")))


def test_widths_and_dtypes() -> None:
    genes, rows = wide(N, [3, 0, 40])
    for width, options in (
        (42, {}),
        (48, {"pad_to_multiple_of": 16}),
        (50, {"padding": "max_length"}),
        (64, {"padding": "max_length", "pad_to_multiple_of": 32}),
    ):
        recipe = rank(length=50, missing_medians="drop")
        vocabulary = {gene: i + 4 for i, gene in enumerate(genes)} | SPECIALS
        recipe = tokens.geneformer_v2(vocabulary, MEDIANS, length=50)
        batch = tokens.encode(rows, recipe, genes, ids_dtype="int32", **options)
        assert batch["input_ids"].shape == (3, width)
        assert batch["input_ids"].dtype == np.int32
        assert batch["lengths"].tolist() == [5, 2, 42]
        assert batch["attention_mask"].sum(1).tolist() == [5, 2, 42]
        assert (batch["input_ids"][~batch["attention_mask"]] == 0).all()
    packed = tokens.encode(rows, recipe, genes, padding="packed")
    assert packed["cu_seqlens"].tolist() == [0, 5, 7, 49]
    assert packed["cu_seqlens"].dtype == np.int32
    assert packed["max_seqlen"] == 42
    flat = batch["input_ids"][batch["attention_mask"]]
    assert packed["input_ids"].tolist() == flat.tolist()


def test_names_of_a_model() -> None:
    genes, rows = wide(N, [3])
    recipe = tokens.scgpt(VOCABULARY, side="one", names={"input_ids": "gene", "values": "expr"})
    batch = tokens.encode(rows, recipe, genes)
    assert set(batch) == {"gene", "expr", "lengths", "attention_mask"}


@pytest.mark.parametrize("padding", ["longest", "max_length", "packed"])
def test_a_batch_without_rows_has_all_outputs(padding: str) -> None:
    none = csr_matrix((0, N), dtype=np.float32)
    for name, compiled in COMPILED.items():
        if name == "split" and padding == "packed":
            continue
        options: dict[str, Any] = {"padding": padding, "obs": {"species": [0]}}
        full = tokens.encode(csr_matrix((1, N), dtype=np.float32), compiled, **options)
        options["obs"] = {"species": []}
        for engine in ("host", "reference"):
            made = tokens.encode(none, compiled, engine=engine, **options)
            assert {k: np.asarray(v).dtype for k, v in made.items()} == {
                k: np.asarray(v).dtype for k, v in full.items()
            }, name
            assert len(made["input_ids"]) == len(made["lengths"]) == 0
