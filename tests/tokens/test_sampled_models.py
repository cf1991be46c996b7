"""Sampled sentences: what UCE, State and CellariumGPT make of the same cells, chance aside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu import tokens
from hbx_gpu.tokens import _reference_sampled
from hbx_gpu.tokens._draws import Draws, thin
from tests.tokens.fixtures import Tokens, ragged, unpadded


def uce(data: Tokens, z: dict[str, np.ndarray], **options: int) -> tokens.WeightedSentence:
    tables = [
        dict(zip(data.genes, z[name].tolist(), strict=True)) for name in ("protein_index", "chrom", "start")
    ]
    plain: dict[str, Any] = {"length": int(z["pad_length"]), "samples": int(z["sample_size"])}
    return tokens.uce(*tables, **(plain | options))


def test_uce_sentences_from_the_package_s_own_draws(data: Tokens) -> None:
    """Given the genes that NumPy drew for UCE, its sentences come out, equal starts aside."""
    z = data.load("uce")
    compiled = tokens.compile(uce(data, z), data.genes)
    program: Any = compiled.program
    tables = compiled.tables
    start = dict(zip(z["protein_index"].tolist(), z["start"].tolist(), strict=True))
    for i, row in enumerate(z["rows"]):
        drawn = z["sampled_columns"][i].astype(np.int64)
        expected = z["sentence_np_seed_1000_plus_row"][i][: z["length"][i]]
        codes = expected[expected >= program.offset] - program.offset
        made = _reference_sampled.sentence(program, tables, drawn, codes.tolist())
        assert [start.get(t, t) for t in made.tolist()] == [start.get(t, t) for t in expected.tolist()]
        assert sorted(made) == sorted(expected)
        # Their draws: NumPy's choice with probabilities, from log1p in float32.
        if i < len(z["weights_ptr"]) - 1:
            counts = data.counts[row]
            if not counts.nnz:
                continue
            weights = np.zeros(len(data.genes), np.float64)
            weights[counts.indices] = ragged(z["weights_f32"], z["weights_ptr"])[i]
            sums = np.cumsum(weights)
            places = np.random.RandomState(1000 + row).random_sample(len(drawn))
            assert np.array_equal(np.searchsorted(sums / sums[-1], places, side="right"), drawn)
            logs = np.log1p(counts.data).astype(np.float32)
            assert np.allclose(logs / logs.sum(), weights[counts.indices], rtol=1e-5)


def test_uce(data: Tokens, engine: str) -> None:
    z = data.load("uce")
    batch = tokens.encode(data.rows(z["rows"]), uce(data, z), data.genes, engine=engine)
    chromosome = dict(zip(z["protein_index"].tolist(), z["chrom"].tolist(), strict=True))
    start = dict(zip(z["protein_index"].tolist(), z["start"].tolist(), strict=True))
    expected = np.zeros(len(data.genes))
    hits = np.zeros(len(data.genes))
    column = {token: c for c, token in enumerate(z["protein_index"].tolist())}
    for i, ids in enumerate(unpadded(batch)):
        counts = data.counts[z["rows"][i]]
        logs = np.log1p(counts.data)
        if not len(logs):
            assert ids.tolist() == [3]
            continue
        expected[counts.indices] += logs / logs.sum() * int(z["sample_size"])
        assert ids[0] == 3
        inside = ids[1:]
        opens = np.flatnonzero(inside >= 143_574)
        ends = np.append(opens[1:], len(inside))
        codes = inside[opens] - 143_574
        assert len(set(codes.tolist())) == len(codes)
        n = 0
        for a, b, code in zip(opens, ends, codes.tolist(), strict=True):
            genes = inside[a + 1 : b - 1].tolist()
            assert inside[b - 1] == 2
            assert {chromosome[g] for g in genes} == {code}
            assert [start[g] for g in genes] == sorted(start[g] for g in genes)
            n += len(genes)
            for gene in genes:
                hits[column[gene]] += 1
        assert n == int(z["sample_size"])
    often = expected >= 20
    assert often.any()
    chi = ((hits[often] - expected[often]) ** 2 / expected[often]).sum()
    assert chi < often.sum() + 4 * np.sqrt(2 * often.sum())
    # A cell without genes stays.
    empty = tokens.encode(data.counts[:1] * 0, uce(data, z), data.genes, engine=engine)
    assert empty["input_ids"].tolist() == [[3]]


def test_uce_draws_are_known(small: Tokens, engine: str) -> None:
    z = small.load("native")
    known = {small.genes[c]: c + 4 for c in np.flatnonzero(z["known_gene"]).tolist()}
    same = dict.fromkeys(small.genes, 0)
    starts = {gene: i for i, gene in enumerate(small.genes)}
    recipe = tokens.uce(known, same, starts, samples=96, length=99)
    cells = int(z["first_cell"]) + np.arange(small.counts.shape[0])
    batch = tokens.encode(
        small.counts, recipe, small.genes, int(z["seed"]), int(z["epoch"]), cells, engine=engine
    )
    drawn = ragged(z["weighted96_log1p_fixed32"], z["weighted96_log1p_fixed32_ptr"])
    for ids, columns in zip(unpadded(batch), drawn, strict=True):
        assert (ids[2:-1] - 4).tolist() == np.sort(columns).tolist()


def state(data: Tokens, z: dict[str, np.ndarray], **options: object) -> tokens.GeneSentence:
    valid = z["valid_gene_mask"] & (z["local_to_global"] >= 0)
    vocabulary = {data.genes[c]: int(z["local_to_global"][c]) for c in np.flatnonzero(valid).tolist()}
    defaults = {
        "length": int(z["pad_length"]),
        "tasks": (int(z["P"]), int(z["N"]), int(z["S"])),
        "cls_gene": int(z["cls_token_idx"]),
        "reference_unexpressed": True,
    }
    return tokens.state_se(vocabulary, **(defaults | options))  # type: ignore[arg-type]


def test_state(data: Tokens, engine: str) -> None:
    z = data.load("state", "_se")
    theirs = {name: z[name] for name in ("sentence_counts", "task_counts", "task_genes", "total_counts")}
    sentences = z["sentence_torch_seed_500_plus_row"]
    n_p, n_n, n_s = (int(z[name]) for name in "PNS")
    for raw in (True, False):
        chosen = np.flatnonzero(z["judged_raw"] == raw)
        if not len(chosen):
            continue
        rows = data.rows(z["rows"][chosen])
        recipe = state(data, z, values="counts" if raw else "log1p")
        batch = tokens.encode(rows, recipe, data.genes, seed=1, engine=engine)
        column = {gene: c for c, gene in enumerate(data.genes)}
        by_id = {number: column[gene] for gene, number in recipe.vocabulary.items()}  # type: ignore[union-attr]
        dense = rows.toarray()
        level = np.log1p(dense) if raw else dense
        for i, k in enumerate(chosen):
            assert np.allclose(batch["values"][i], theirs["sentence_counts"][k], rtol=2e-6, atol=1e-7)
            ours = batch["input_ids"][i]
            assert ours[0] == sentences[k][0]
            for ids in (ours, sentences[k]):
                assert len(set(ids[1:].tolist())) == len(ids) - 1
                sorted_levels = [level[i][by_id[int(g)]] for g in ids[1:]]
                assert sorted_levels == sorted(sorted_levels, reverse=True)
            for ids, values, total in (
                (batch["task_ids"][i], batch["task_values"][i], batch["totals"][i]),
                (theirs["task_genes"][k], theirs["task_counts"][k], theirs["total_counts"][k]),
            ):
                expected = [level[i][by_id[int(g)]] if int(g) in by_id else 0.0 for g in ids]
                assert np.allclose(values, expected, rtol=1e-6)
                assert np.isclose(total, sum(expected), rtol=1e-5)
                n_expressed = int((level[i][list(by_id.values())] > 0).sum())
                if n_expressed >= n_p:
                    assert (values[:n_p] > 0).all()
                    assert len(set(ids[:n_p].tolist())) == n_p
                if n_expressed < len(by_id) - n_n:
                    assert (values[n_p : n_p + n_n] < 1).all()
        assert (batch["task_ids"][:, n_p + n_n :] == batch["task_ids"][0, n_p + n_n :]).all()
        assert batch["task_ids"].shape[1] == n_p + n_n + n_s
    strict = state(data, z, reference_unexpressed=False)
    batch = tokens.encode(data.rows(z["rows"][:8]), strict, data.genes, engine=engine)
    enough = [(data.counts[r].nnz < len(by_id) - n_n) for r in z["rows"][:8]]
    assert not batch["task_values"][enough, n_p : n_p + n_n].any()


def cellarium(
    data: Tokens, z: dict[str, np.ndarray], **options: object
) -> tuple[tokens.PromptQuery, dict[str, Any]]:
    n = len(z["rows"])
    metadata = [
        tokens.ObsTokens("cell_type", {f"CL:{i}": i for i in range(6)}, unknown=-1),
        tokens.ObsTokens("tissue", {f"UBERON:{i}": i for i in range(4)}, unknown=-1),
    ]
    obs = {
        "cell_type": [f"CL:{j % 7}" for j in range(n)],
        "tissue": [f"UBERON:{j % 4}" for j in range(n)],
    }
    length = z["train_torch11.prompt_mask_nc"].shape[1]
    recipe = tokens.cellarium_gpt(data.genes, length=length, metadata=metadata, **options)
    return recipe, obs


def test_cellarium_gpt_predicts(small: Tokens, engine: str) -> None:
    z = small.load("cellarium_gpt")
    value = "predict.token_value_nc_dict."
    queries = frozenset(small.genes[::3])
    recipe, obs = cellarium(small, z, predict=True, max_umis=100.0, queries=queries)
    batch = tokens.encode(small.rows(z["rows"]), recipe, small.genes, obs=obs, engine=engine)
    assert np.array_equal(batch["input_ids"], z[value + "gene_id"])
    given = ~np.isnan(z[value + "gene_value"])  # theirs divides by a total of 0
    assert np.allclose(batch["values"][given], z[value + "gene_value"][given], rtol=3e-7)
    assert np.array_equal(batch["query_mask"], z[value + "gene_query_mask"])
    assert np.allclose(batch["total_counts"], z[value + "total_mrna_umis"], rtol=3e-7)
    assert np.array_equal(batch["prompt_mask"][:, :-2], z["predict.prompt_mask_nc"][:, :-2])


@pytest.mark.parametrize("name", ["fixed_torch12", "train_torch11"])
def test_cellarium_gpt_trains(data: Tokens, engine: str, name: str) -> None:
    """Genes and prefixes are drawn; what follows from them is not."""
    z = data.load("cellarium_gpt")
    fixed = name == "fixed_torch12"
    most = 1e9 if fixed else 1e5
    options = {"thinned": 0.0, "prefix": 40, "prompts": ("tissue",)} if fixed else {"min_umis": 100.0}
    recipe, obs = cellarium(data, z, max_umis=most, **options)
    rows = data.rows(z["rows"])
    n = rows.shape[0]
    ours = tokens.encode(rows, recipe, data.genes, obs=obs, engine=engine)
    value = f"{name}.token_value_nc_dict."
    theirs = {
        "input_ids": z[value + "gene_id"],
        "values": z[value + "gene_value"],
        "query_mask": z[value + "gene_query_mask"],
        "total_counts": z[value + "total_mrna_umis"],
        "prompt_mask": z[f"{name}.prompt_mask_nc"],
        "labels": z[f"{name}.label_nc_dict.gene_value"],
        "label_weights": z[f"{name}.label_weight_nc_dict.gene_value"],
    }
    dense, totals = rows.toarray(), np.asarray(rows.sum(1)).ravel()
    j = ours["input_ids"].shape[1] - 2
    for made in (ours, theirs):
        for i in range(n):
            genes = made["input_ids"][i, :j]
            assert len(set(genes.tolist())) == j
            query = made["query_mask"][i, :j].astype(bool)
            prefix = int((~query).sum())
            assert query[prefix:].all()
            assert np.array_equal(made["prompt_mask"][i, :j], ~query)
            assert np.allclose(made["label_weights"][i, :j], query / max(query.sum(), 1) / n, rtol=1e-5)
            counts = dense[i][genes]
            depth = np.expm1(made["total_counts"][i, :j].astype(np.float64))
            top = min(totals[i], most)
            if fixed:
                assert prefix == 40
                assert np.allclose(depth, top, rtol=1e-4)
                assert np.allclose(made["values"][i, :j], np.log1p(counts) * ~query, rtol=1e-6)
                assert np.array_equal(made["labels"][i, :j], np.minimum(counts, 1999))
            else:
                lowest, highest = sorted((100.0, float(top)))
                assert depth.min() >= lowest * 0.999 - 1
                assert depth.max() <= highest * 1.001 + 1
                assert (made["labels"][i, :j] <= counts).all()
                full = np.isclose(depth, top, rtol=1e-3)
                assert 0.3 < full.mean() < 0.75 or abs(top - 100) < 5
    if fixed:
        assert np.array_equal(ours["prompt_mask"][:, j:], theirs["prompt_mask"][:, j:])
        hidden = z[value + "cell_type"][:, j]
        assert ours["metadata_ids"][:, 0].tolist() == hidden.tolist()
        assert ours["metadata_ids"][:, 1].tolist() == z[value + "tissue"][:, j + 1].tolist()


def test_cellarium_gpt_thins_as_binomials_do(small: Tokens) -> None:
    z = small.load("native")
    expected = ragged(z["thin_0.3"], z["thin_0.3_ptr"])
    for i, theirs in enumerate(expected):
        if len(theirs) == 0 or theirs[0] < 0:
            continue
        one = small.counts[i]
        known = z["known_gene"][one.indices]
        made = thin(
            Draws(int(z["seed"]), int(z["epoch"]), int(z["first_cell"]) + i),
            one.indices[known].astype(np.int64),
            one.data[known],
            np.full(int(known.sum()), 0.3),
        )
        assert made.tolist() == theirs.tolist()
