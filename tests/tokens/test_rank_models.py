"""Rank values, equal to what Geneformer's implementations and Nicheformer make of the same cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu import tokens
from hbx_gpu.tokens import _reference
from hbx_gpu.tokens._program import Sequence
from hbx_gpu.tokens._rows import known_genes
from tests.tokens.fixtures import Tokens, equal_up_to_ties, ragged, unpadded

SPECIALS = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


def values_of(data: Tokens, compiled: tokens.Compiled, row: int) -> dict[int, float]:
    """What each token of a row is ranked by; infinite for special tokens."""
    one = data.counts[row]
    cell = known_genes(one.indices, one.data, compiled.tables)
    assert isinstance(compiled.program, Sequence)
    ranked = _reference.rank_values(compiled.program, compiled.tables, cell)
    found = dict(zip(compiled.tables.token[cell.columns].tolist(), ranked.tolist(), strict=True))
    return {**dict.fromkeys(range(5), np.inf), **found}


@pytest.mark.parametrize("arithmetic", ["f64_recip", "f32_recip"])
@pytest.mark.parametrize("version", ["v2", "v1"])
def test_helical(data: Tokens, engine: str, arithmetic: str, version: str) -> None:
    z = data.load("geneformer", "_helical")
    tag = f"{version}_{arithmetic}"
    if f"{tag}_input_ids" not in z:
        pytest.skip("helical made no ids of this pair")
    make = tokens.geneformer_v2 if version == "v2" else tokens.geneformer_v1
    vocabulary = data.vocabulary(
        z[f"{version}_gene_token"], **(SPECIALS if version == "v2" else {"<pad>": 0})
    )
    recipe = make(
        vocabulary, data.table(z["medians"]), arithmetic=arithmetic, length=int(z["model_input_size"])
    )
    compiled = tokens.compile(recipe, data.genes)
    batch = tokens.encode(data.counts, compiled, engine=engine)
    assert batch["lengths"].tolist() == z[f"{tag}_length"].tolist()
    theirs = ragged(z[f"{tag}_input_ids"], z[f"{tag}_ptr"])
    for row, (a, b) in enumerate(zip(unpadded(batch), theirs, strict=True)):
        value = values_of(data, compiled, row)
        if version == "v2":
            assert a[[0, -1]].tolist() == b[[0, -1]].tolist() == [2, 3]
            a, b = a[1:-1], b[1:-1]
        assert equal_up_to_ties(a, b, value), row
    if f"{tag}_ranked" in z:  # all genes, before they are cut
        long = tokens.encode(
            data.counts[: len(z[f"{tag}_ranked_ptr"]) - 1],
            make(vocabulary, data.table(z["medians"]), arithmetic=arithmetic, length=len(data.genes) + 2),
            data.genes,
            engine=engine,
        )
        for row, b in enumerate(ragged(z[f"{tag}_ranked"], z[f"{tag}_ranked_ptr"])):
            a = unpadded(long)[row]
            assert equal_up_to_ties(a[1:-1] if version == "v2" else a, b, values_of(data, compiled, row))
            # A float32 total above 2**24 depends on the order of its sum; ours is summed in integers.
            if f"{tag}_value" in z and (arithmetic[:3] == "f64" or data.counts[row].sum() <= 2**24):
                expected = ragged(z[f"{tag}_value"], z[f"{tag}_ranked_ptr"])[row]
                value = values_of(data, compiled, row)
                assert [value[int(i)] for i in b] == expected.tolist()


@pytest.mark.parametrize("arithmetic", ["f64_recip", "f64_div"])
def test_hugging_face(data: Tokens, engine: str, arithmetic: str) -> None:
    z = data.load("geneformer", "_hf")
    recipe = tokens.geneformer_v2(
        data.vocabulary(z["v2_gene_token"], **SPECIALS),
        data.table(z["medians"]),
        arithmetic=arithmetic,
        length=int(z["model_input_size"]),
        keep_counts=True,
    )
    kept = z["cells_kept"]
    batch = tokens.encode(data.rows(kept), recipe, data.genes, engine=engine)
    tag = f"hfv2_{arithmetic}"
    assert batch["lengths"].tolist() == z[f"{tag}_length"].tolist()
    theirs = ragged(z[f"{tag}_input_ids"], z[f"{tag}_ptr"])
    for a, b in zip(unpadded(batch), theirs, strict=False):
        assert a.tolist() == b.tolist()
    if f"{tag}_counts" in z:
        expected = ragged(z[f"{tag}_counts"], z[f"{tag}_ptr"])
        for a, b in zip(unpadded(batch, "values"), expected, strict=False):
            assert np.array_equal(a, b.astype(np.float32))


def test_cells_without_known_genes_keep_their_place(data: Tokens, engine: str) -> None:
    """The Hugging Face tokenizer drops them; labels beside tokens would no longer fit."""
    z = data.load("geneformer", "_hf")
    recipe = tokens.geneformer_v2(
        data.vocabulary(z["v2_gene_token"], **SPECIALS), data.table(z["medians"]), length=8
    )
    gone = np.setdiff1d(np.arange(data.counts.shape[0]), z["cells_kept"])
    assert len(gone)
    batch = tokens.encode(data.rows(gone), recipe, data.genes, engine=engine)
    assert batch["lengths"].tolist() == [2] * len(gone)
    assert (batch["input_ids"] == [2, 3]).all()


def test_bionemo(data: Tokens, engine: str) -> None:
    z = data.load("geneformer", "_bionemo")
    vocabulary = data.vocabulary(
        z["gene_token"], **{"[CLS]": 0, "[MASK]": 1, "[PAD]": 2, "[SEP]": 3, "[UKW]": 4}
    )
    recipe = tokens.bionemo_geneformer(vocabulary, data.table(z["medians"]), length=int(z["max_len"]))
    compiled = tokens.compile(recipe, data.genes)
    batch = tokens.encode(data.rows(z["rows"]), compiled, padding="max_length", engine=engine)
    for row, a, b in zip(
        z["rows"], unpadded(batch), ragged(z["f32_div_text_unmasked"], z["f32_div_ptr"]), strict=True
    ):
        value = values_of(data, compiled, int(row))
        assert a[0] == b[0] == 0
        assert equal_up_to_ties(a[1:], b[1:], value)
    # Their masked batch, as far as it is not chance: where, and what was there before.
    text, labels = z["seed99_epoch3_batch_text"], z["seed99_epoch3_batch_labels"]
    assert batch["input_ids"].shape[1] == text.shape[1]
    assert ((text == 2) == ~batch["attention_mask"][: len(text)]).all()
    masked = labels >= 0
    shares = [(text[masked] == 1).mean(), (text[masked] == labels[masked]).mean()]
    n = masked.sum()
    ours = tokens.encode(
        data.rows(z["rows"]),
        tokens.bionemo_geneformer(vocabulary, data.table(z["medians"]), length=int(z["max_len"]), mlm=0.15),
        data.genes,
        padding="max_length",
        engine=engine,
    )
    ids, label = ours["input_ids"], ours["labels"]
    chosen = label >= 0
    assert (ids[:, 0] == 0).all()
    assert not chosen[:, 0].any()
    assert np.array_equal(np.where(chosen, label, ids), batch["input_ids"])
    assert abs(chosen.sum() / ours["attention_mask"].sum() - 0.15) < 0.02
    assert abs((ids[chosen] == 1).mean() - shares[0]) < 4 * np.sqrt(0.16 / n) + 0.01
    assert abs((ids[chosen] == label[chosen]).mean() - shares[1]) < 4 * np.sqrt(0.09 / n) + 0.01
    assert ids[chosen & (ids != 1)].min() >= 5


def test_cellarium(data: Tokens, engine: str) -> None:
    z = data.load("cellarium_geneformer")
    genes = [data.genes[c] for c in z["columns"]]
    recipe = tokens.cellarium_geneformer(
        genes, data.table(data.inputs["medians"]), length=z["input_ids"].shape[1]
    )
    n = len(z["input_ids"])
    compiled = tokens.compile(recipe, data.genes)
    batch = tokens.encode(data.counts[:n], compiled, padding="max_length", engine=engine)
    assert np.array_equal(batch["attention_mask"], z["attention_mask"])
    for row in range(n):
        value = values_of(data, compiled, row)
        length = batch["lengths"][row]
        a, b = batch["input_ids"][row][:length], z["input_ids"][row][:length]
        assert equal_up_to_ties(a, b, value)
        if row < len(z["value_f32"]):
            assert [value[int(i)] for i in a] == z["value_f32"][row][:length].astype(np.float64).tolist()


@pytest.mark.parametrize("tag", ["tied", "unique", "positive"])
def test_nicheformer(data: Tokens, engine: str, tag: str) -> None:
    z = data.load("nicheformer")
    means = z["technology_mean" if tag == "tied" else f"technology_mean_{tag}"]
    expected = z[f"X_{tag}"]
    n = len(expected)
    recipe = tokens.nicheformer(
        data.genes, data.table(means), length=min(expected.shape[1], len(data.genes)), pad=0
    )
    compiled = tokens.compile(recipe, data.genes)
    batch = tokens.encode(data.counts[:n], compiled, padding="max_length", engine=engine)
    assert np.array_equal(batch["attention_mask"], expected != 0)
    if tag == "positive":
        assert np.array_equal(batch["input_ids"], expected)
    for row, (a, b) in enumerate(zip(unpadded(batch), expected, strict=True)):
        value = {i: v for i, v in values_of(data, compiled, row).items() if v < np.inf}
        assert equal_up_to_ties(a, b[b != 0], value)


def test_nicheformer_context_and_masks(data: Tokens, engine: str) -> None:
    z = data.load("nicheformer")
    given = z["masking_torch21_X"]
    n, width = given.shape
    context = [
        tokens.ObsTokens("species", {"mouse": 5}),
        tokens.ObsTokens("assay", {"merfish": 11}),
        tokens.ObsTokens("modality", {"spatial": 3}),
    ]
    options: Any = {"technology_mean": data.table(z["technology_mean_positive"]), "context": context}
    plain = tokens.nicheformer(data.genes, length=width, **options)
    obs = {"species": ["mouse"] * n, "assay": ["merfish"] * n, "modality": ["spatial"] * n}
    batch = tokens.encode(data.counts[:n], plain, data.genes, obs=obs, padding="max_length", engine=engine)
    cut = np.where(z["X_positive"] == 0, 1, z["X_positive"])
    expected = np.concatenate([np.tile([5, 11, 3], (n, 1)), cut], axis=1)[:, :width]
    assert np.array_equal(batch["input_ids"], expected)
    masked = tokens.nicheformer(data.genes, length=width, mlm=0.15, **options)
    hidden = tokens.encode(data.counts[:n], masked, data.genes, obs=obs, padding="max_length", engine=engine)
    chosen = hidden["labels"] >= 0
    assert not chosen[(expected == 1) | (expected == 3)].any()
    assert np.array_equal(np.where(chosen, hidden["labels"], hidden["input_ids"]), expected)
    # As often as theirs, whose mask is 0 where it predicts.
    theirs = z["masking_torch21_mask"] == 0
    real = (expected != 1) & (expected != 3)
    assert abs(chosen[real].mean() - 0.15) < 0.02
    assert abs(theirs[real].mean() - chosen[real].mean()) < 0.02
    ids = hidden["input_ids"]
    assert abs((ids[chosen] == 0).mean() - 0.81) < 0.04
    assert abs((ids[chosen] == expected[chosen]).mean() - 0.09) < 0.03
