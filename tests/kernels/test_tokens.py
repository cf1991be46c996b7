"""Kernels of tokens: the bits of the reference, whatever rows look like and wherever they are sorted."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from hbx_gpu import SparseBatch, tokens
from hbx_gpu._engine.device import sources
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import _encode
from hbx_gpu.tokens._cells import Options
from hbx_gpu.tokens._device import records
from hbx_gpu.tokens._device.batch import DeviceTokens
from hbx_gpu.tokens._numbers import F, I
from tests.kernels.conftest import ORDERS, emulated, on_gpu
from tests.tokens.emulated import Emulated
from tests.tokens.recipes import COMPILED, GENES, RECIPES, SPECIALS, VOCABULARY, N, odd_rows, same

# Draws for every four counts, and logarithms that sum exactly: no huge counts.
SMALL = ("gpt", "state log")
# A sanitizer of races sees which code runs, not what it gives: one form of the outputs is enough for each
# recipe, unless a barrier is missing that any form may meet.
ONE_FORM = os.environ.get("HBX_EMULATED_WATCH") == "races" and "HBX_EMULATED_WITHOUT" not in os.environ


@pytest.fixture(scope="module", params=[*ORDERS, pytest.param("cuda", marks=pytest.mark.gpu)])
def order(request: pytest.FixtureRequest) -> str:
    """Where kernels run; skips or fails where they cannot."""
    chosen = str(request.param)
    if chosen == "cuda":
        on_gpu()
    else:
        emulated(chosen)
    return chosen


def compare(batch: SparseBatch, compiled: Any, engine: Emulated, **options: Any) -> dict[str, np.ndarray]:
    obs = {"species": np.arange(len(batch)) % 2}
    expected = tokens.encode(batch, compiled, None, 11, 4, obs=obs, engine="reference", **options)
    _encode.ENGINES["under test"] = engine
    try:
        found = tokens.encode(batch, compiled, None, 11, 4, obs=obs, engine="under test", **options)
    finally:
        del _encode.ENGINES["under test"]
    same(expected, found)
    return found


@pytest.mark.parametrize("shared_keys", [16, 2112])
@pytest.mark.parametrize("name", RECIPES)
def test_tokens_are_those_of_the_reference(name: str, order: str, shared_keys: int) -> None:
    """In rows that are sorted in shared memory, and in rows that are too long for it."""
    engine = Emulated(order, shared_keys)
    forms: list[dict[str, Any]] = [
        {"ids_dtype": "int32"},
        {"padding": "max_length", "pad_to_multiple_of": 8},
        {"padding": "longest" if name == "split" else "packed"},
    ]
    chosen = list(RECIPES).index(name) % len(forms)
    for seed, options in enumerate(forms):
        if ONE_FORM and seed != chosen:
            continue
        batch = odd_rows(seed, small=name in SMALL, in_order=seed == 1)
        compare(batch, COMPILED[name], engine, **options)


@pytest.mark.parametrize(
    "name", ["expressed", "expressed value", "foundation", "bins all", "split", "uce", "state", "gpt"]
)
def test_a_block_takes_row_after_row(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceTokens, "_grid", lambda *_: 2)
    compare(odd_rows(5, small=name in SMALL), COMPILED[name], Emulated(order))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float16", "float32", "float64"])
def test_counts_of_any_dtype(dtype: str) -> None:
    batch = odd_rows(3, small=True)
    converted = SparseBatch(batch.indices, batch.values.astype(dtype), batch.offsets, N, batch.metadata)
    compare(converted, COMPILED["rank f64_div"], Emulated())


def long_row(n_genes: int, nnz: int, counts: tuple[int, ...]) -> tuple[list[str], SparseBatch]:
    rng = np.random.default_rng(nnz)
    columns = np.sort(rng.choice(n_genes, nnz, replace=False)).astype(np.int32)
    values = rng.choice(counts, nnz).astype(np.float32)
    genes = [f"g{i}" for i in range(n_genes)]
    return genes, SparseBatch(columns, values, np.array([0, nnz]), n_genes, {})


@pytest.mark.parametrize("nnz", [0, 1, 3_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("counts", [(1,), (1, 2, 3, 90_000)])
def test_rows_of_any_length(nnz: int, counts: tuple[int, ...]) -> None:
    genes, row = long_row(max(2 * nnz, 3_000), nnz, counts)
    words = {gene: i + 4 for i, gene in enumerate(genes) if i % 5} | SPECIALS
    for recipe in (
        tokens.geneformer_v2(words, dict.fromkeys(genes, 1.5), mlm=0.15, length=600),
        tokens.scgpt(words, side="both", length=700, mask=tokens.MaskValues(0.4, exact=True)),
        tokens.ExpressedGenes(words, length=500, order="value", fill_to=600),
    ):
        compare(row, tokens.compile(recipe, genes), Emulated(shared_keys=700))


@pytest.mark.slow
def test_a_row_of_seventy_thousand() -> None:
    genes, row = long_row(70_001, 70_000, (1, 1, 2, 5000))
    words = {gene: i + 4 for i, gene in enumerate(genes)} | SPECIALS
    for recipe in (
        tokens.geneformer_v2(words, dict.fromkeys(genes, 1.5)),
        tokens.scgpt(words, side="one", mask=0.4),
    ):
        compare(row, tokens.compile(recipe, genes), Emulated())


def test_keys_that_differ_in_their_last_bits_are_told_apart() -> None:
    """Neighbors in value, beside one far away: the leading bits of their keys are the same."""
    genes = [f"g{i}" for i in range(300)]
    medians = {gene: 1.0 + (i * 7 % 300) * 2.0**-50 for i, gene in enumerate(genes)} | {"g0": 1e-9}
    words = {gene: i + 4 for i, gene in enumerate(genes)} | SPECIALS
    batch = SparseBatch(np.arange(300, dtype=np.int32), np.ones(300), np.array([0, 300]), 300, {})
    for length in (60, 400):
        recipe = tokens.geneformer_v2(words, medians, length=length)
        compare(batch, tokens.compile(recipe, genes), Emulated(shared_keys=128))


def test_genes_that_draw_the_same_keep_their_order() -> None:
    """All genes share one number, so that no draw tells them apart."""
    recipe = tokens.state_se(VOCABULARY, length=24, tasks=(7, 6, 5))
    compiled = tokens.compile(recipe, GENES, columns=np.full(N, 3))
    compare(odd_rows(2), compiled, Emulated())


def test_nothing_in_the_vocabulary() -> None:
    recipe = tokens.geneformer_v2({"g3": 9} | SPECIALS, {"g3": 1.0})
    batch = SparseBatch(np.array([1, 2, 5], np.int32), np.ones(3), np.array([0, 2, 3]), N, {})
    found = compare(batch, tokens.compile(recipe, GENES), Emulated())
    assert found["lengths"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.5, 1], "not finite"), ([-1, 1], "negative"), ([np.inf, 1], "not finite"), ([np.nan, 1], "fractions"),
     ([2.0**53, 1], "2\\*\\*53"), ([2.0**60, 1], "2\\*\\*53")],
)  # fmt: skip
def test_values_that_are_no_counts(values: list[float], message: str) -> None:
    batch = SparseBatch(np.array([1, 2], np.int32), np.array(values), np.array([0, 0, 2]), N, {})
    _encode.ENGINES["under test"] = Emulated()
    try:
        with pytest.raises(InvalidDataError, match=message):
            tokens.encode(batch, COMPILED["rank f64_div"], engine="under test")
    finally:
        del _encode.ENGINES["under test"]


@pytest.mark.parametrize("field", ["capacity", "n_elements", "n_places", "longest"])
@pytest.mark.parametrize("name", ["rank f64_div", "split", "uce", "state", "gpt"])
def test_rows_that_do_not_fit_are_refused(name: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is wrong about room is told so; nothing is written beyond it."""
    made = DeviceTokens._record

    def less(self: Any, *args: Any) -> Any:
        record, *rest = made(self, *args)
        record[field] = 3
        return record, *rest

    monkeypatch.setattr(DeviceTokens, "_record", less)
    batch = odd_rows(1, small=True)
    with pytest.raises(RuntimeError, match="bug of hbx_gpu"):
        compare(batch, COMPILED[name], Emulated(shared_keys=128))


def test_records_are_those_of_the_kernels() -> None:
    import re

    text = (sources.kernels_folder() / "tokens.cuh").read_text()
    types = {"u64": "<u8", "u32": "<u4", "double": "<f8"}
    for name, dtype in (("HbxRecipe", records.RECIPE), ("HbxRows", records.ROWS)):
        body = re.search(rf"struct {name} \{{\n(.*?)\n\}};", text, re.DOTALL)
        assert body is not None
        fields = re.findall(r"^    (.+?) ?(\w+);", body[1], re.MULTILINE)
        assert [(field, "<u8" if "*" in kind else types[kind]) for kind, field in fields] == [
            (field, dtype[field].str) for field in dtype.names or ()
        ]
    places = re.findall(r"enum \{(.*?)\};", text, re.DOTALL)
    for names, enum, prefix in zip(places, (I, F), ("HBX_I_", "HBX_F_"), strict=True):
        found = [name.removeprefix(prefix) for name in re.findall(r"\w+", names)]
        assert found == [member.name for member in enum]
    assert f"#define HBX_TOO_MANY {records.TOO_MANY}u" in text


def test_options_are_kept_by_the_engine() -> None:
    """Names of outputs are known before the first batch."""
    recipe = tokens.scgpt(VOCABULARY, side="one", names={"input_ids": "gene"})
    compiled = tokens.compile(recipe, GENES)
    found = DeviceTokens(compiled, Options("packed"), Emulated().backend).names
    assert found == ["gene", "lengths", "values", "cu_seqlens", "max_seqlen"]
