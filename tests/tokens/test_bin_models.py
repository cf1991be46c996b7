"""Quantile bins, equal to what scGPT and Tahoe-x1 make of the same cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu import tokens
from hbx_gpu.tokens import _arithmetic as a
from tests.tokens.fixtures import Tokens, ragged, unpadded


def by_gene(ids: np.ndarray, values: np.ndarray) -> dict[int, float]:
    """Value of each id; ids stand in a row once."""
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def lacking(row: np.ndarray, pad: int) -> np.ndarray:
    result: np.ndarray = row[row != pad]
    return result


def all_genes(data: Tokens, **options: Any) -> tokens.QuantileBins:
    """Bins over every gene of the table, in column order."""
    vocabulary = {gene: i + 2 for i, gene in enumerate(data.genes)} | {"<pad>": 0, "<cls>": 1}
    return tokens.scgpt(vocabulary, length=len(data.genes) + 1, **options)


def test_scgpt_one_sided_bins(data: Tokens, engine: str) -> None:
    z = data.load("scgpt")
    batch = tokens.encode(data.counts, all_genes(data, side="one"), data.genes, engine=engine)
    found = np.concatenate([row[1:] for row in unpadded(batch, "values")])
    assert np.array_equal(found, z["raw_bin_left"])
    assert all(row[0] == -2 for row in batch["values"])


def test_scgpt_edges_and_the_package_s_own_draws(data: Tokens) -> None:
    """Given the uniform numbers that NumPy drew for scgpt, its bins come out bit for bit."""
    z = data.load("scgpt")
    edges, below, above = [], [], []
    for row in range(data.counts.shape[0]):
        values = data.counts[row].data.astype(np.float32)
        if len(values):
            edges.append(a.edges_numpy(values, 51))
            digits = a.digits(values, edges[-1])
            below.append(digits[0])
            above.append(digits[1])
        else:
            edges.append(np.zeros(50))
    assert np.array_equal(np.array(edges)[: len(z["raw_edges"])], z["raw_edges"][:, 1:])
    lt, le = np.concatenate(below), np.concatenate(above)
    assert np.array_equal(lt, z["raw_bin_right"])
    u = np.random.RandomState(1234).rand(len(lt))
    assert np.array_equal(np.ceil(u * (lt - le) + le), z["raw_bin_np1234"])


def test_scgpt_two_sided_bins(data: Tokens, engine: str) -> None:
    """Our draws lie where scgpt's can lie, and as evenly."""
    z = data.load("scgpt")
    lt, le = z["raw_bin_right"].astype(int), z["raw_bin_left"].astype(int)
    recipe = all_genes(data, side="both")
    found = []
    for epoch in range(2):
        batch = tokens.encode(data.counts, recipe, data.genes, seed=5, epoch=epoch, engine=engine)
        bins = np.concatenate([row[1:] for row in unpadded(batch, "values")]).astype(int)
        assert (bins <= le).all()
        assert (bins >= np.minimum(lt + 1, le)).all()
        found.append(bins)
    assert (found[0] != found[1]).any()
    wide = le - lt >= 10
    place = (found[0] - lt - 0.5)[wide] / (le - lt)[wide]
    assert abs(place.mean() - 0.5) < 4 * np.sqrt(1 / 12 / wide.sum())


def test_normalized_values(data: Tokens) -> None:
    """log1p agrees with NumPy's float32 function to its last bit or two."""
    z = data.load("scgpt")
    ours = []
    for row in range(data.counts.shape[0]):
        x = data.counts[row].data.astype(np.float32)
        ours.append(x / (np.float32(x.sum(dtype=np.float64)) / np.float32(1e4)))
    normed = np.concatenate(ours)[: len(z["normed_f32"])]
    assert np.array_equal(normed, z["normed_f32"])
    logged = a.log1p(normed.astype(np.float64)).astype(np.float32)
    assert np.abs(logged - z["log1p_f32"]).max() <= 2 * np.spacing(logged.max())
    assert (logged == z["log1p_f32"]).mean() > 0.8


def scgpt_vocabulary(data: Tokens, z: dict[str, np.ndarray]) -> dict[str, int]:
    return data.vocabulary(z["gene_token"], **{"<pad>": 0, "<cls>": 1})


def test_scgpt_truncated(data: Tokens, engine: str) -> None:
    z = data.load("scgpt")
    n, width = z["truncate_gene"].shape
    recipe = tokens.scgpt(
        scgpt_vocabulary(data, z), side="one", length=int(z["max_length"]), sampling=False, keep_counts=True
    )
    batch = tokens.encode(data.rows(z["collate_rows"][:n]), recipe, data.genes, engine=engine)
    assert np.array_equal(batch["input_ids"][:, :width], z["truncate_gene"])
    assert np.array_equal(batch["counts"][:, :width], z["truncate_expr"])


def test_scgpt_collated(data: Tokens, engine: str) -> None:
    """Samples differ; which genes can be there, their bins and the frame do not."""
    z = data.load("scgpt")
    n, width = z["collate_gene"].shape
    length = int(z["max_length"])
    options: Any = {"side": "both", "length": length}
    rows = data.rows(z["collate_rows"][:n])
    recipe = tokens.scgpt(scgpt_vocabulary(data, z), mask=0.4, **options)
    batch = tokens.encode(rows, recipe, data.genes, engine=engine)
    assert batch["input_ids"].shape == (n, width)
    low = tokens.encode(rows, tokens.scgpt(scgpt_vocabulary(data, z), side="one", length=5001), data.genes)
    for i in range(n):
        theirs = lacking(z["collate_gene"][i], 0)
        ours = batch["input_ids"][i][: batch["lengths"][i]]
        assert len(theirs) == len(ours)
        possible = by_gene(low["input_ids"][i][: low["lengths"][i]], low["values"][i][: low["lengths"][i]])
        assert set(ours.tolist()) <= set(possible)
        if len(possible) <= length:  # nothing was sampled
            assert np.array_equal(ours, theirs)
        for ids, values in ((ours, batch["values"][i]), (theirs, z["collate_expr"][i])):
            assert all(value <= possible[int(gene)] for gene, value in zip(ids, values, strict=False))
    masked = batch["masked_values"] != batch["values"]
    assert np.array_equal(masked, batch["mask"])
    assert (batch["masked_values"][masked] == -1).all()
    assert not masked[:, 0].any()
    assert not masked[~batch["attention_mask"]].any()
    share = masked.sum() / (batch["lengths"] - 1).sum()
    assert abs(share - 0.4) < 0.03
    theirs_masked = z["collate_masked_expr_mlm"] == -1
    assert abs(theirs_masked.sum() / (batch["lengths"] - 1).sum() - share) < 0.03


def test_scgpt_pretraining(data: Tokens, engine: str) -> None:
    z = data.load("scgpt", "_pretrain")
    vocabulary = scgpt_vocabulary(data, z)
    n = len(z["both_pcpt_gene"])
    length = int(z["max_length"])
    rows = data.rows(z["rows"][:n])
    plain = tokens.scgpt(vocabulary, side="one", length=length, sampling=False)
    batch = tokens.encode(rows, plain, data.genes, engine=engine)
    width = z["one_sided_truncated_expr"].shape[1]
    assert np.array_equal(batch["values"][:, :width], z["one_sided_truncated_expr"])
    split = tokens.scgpt(vocabulary, side="one", length=length, mask=tokens.Split((0.25, 0.5, 0.75)))
    whole = tokens.encode(rows, tokens.scgpt(vocabulary, side="one", length=5001), data.genes)
    widths = set()
    for number in range(8):
        made = tokens.encode(rows, split, data.genes, batch=number, padding="max_length", engine=engine)
        seen, generated = made["input_ids"].shape[1], made["gen_ids"].shape[1]
        widths.add(generated)
        assert seen + generated == length
        assert generated in {int((length - 1) * p) for p in (0.25, 0.5, 0.75)}
        for i in range(0, n, 7):
            value = dict(zip(whole["input_ids"][i].tolist(), whole["values"][i].tolist(), strict=True))
            a_ids = made["input_ids"][i][: made["lengths"][i]].tolist()
            b_ids = made["gen_ids"][i][: made["gen_lengths"][i]].tolist()
            assert a_ids[0] == 1
            assert not set(a_ids) & set(b_ids)
            assert len(set(a_ids)) == len(a_ids)
            assert made["values"][i][: len(a_ids)].tolist() == [value[g] for g in a_ids]
            assert made["gen_values"][i][: len(b_ids)].tolist() == [value[g] for g in b_ids]
            p = generated / (length - 1)
            n_genes = int(whole["lengths"][i]) - 1
            share = min((0.25, 0.5, 0.75), key=lambda one: abs(one - p))
            assert len(b_ids) == min(generated, int(n_genes * share))
            assert len(a_ids) - 1 == min(seen - 1, n_genes - int(n_genes * share))
    assert len(widths) == 3
    # The same numbers as theirs: how many genes each part of a cell holds.
    theirs = z["both_gen_gene"].shape[1], z["both_pcpt_gene"].shape[1]
    for number in range(40):
        made = tokens.encode(rows, split, data.genes, batch=number, padding="max_length", engine=engine)
        if made["gen_ids"].shape[1] == theirs[0]:
            break
    assert made["input_ids"].shape[1] == theirs[1]
    assert made["gen_lengths"].tolist() == (z["both_gen_gene"] != 0).sum(1).tolist()
    assert made["lengths"].tolist() == (z["both_pcpt_gene"] != 0).sum(1).tolist()


def test_scgpt_fine_tuning_over_all_genes(small: Tokens, engine: str) -> None:
    z = small.load("scgpt")
    columns = z["finetune_columns"]
    genes = [small.genes[c] for c in columns]
    ids = z["gene_token"][columns]
    vocabulary = dict(zip(genes, ids.tolist(), strict=True)) | {"<pad>": 0, "<cls>": 1}
    recipe = tokens.scgpt(
        vocabulary,
        side="one",
        length=len(genes) + 1,
        front=(("<cls>", 0.0),),
        zeros=True,
        mask=tokens.MaskValues(0.4, exact=True, protect_front=False),
    )
    panel = small.counts[:, columns]
    batch = tokens.encode(panel, recipe, genes, engine=engine)
    assert (batch["input_ids"] == [1, *ids]).all()
    assert (batch["lengths"] == len(genes) + 1).all()
    dense = panel.toarray()
    assert ((batch["values"][:, 1:] > 0) == (dense > 0)).all()
    # Their bins lie between ours of one and the other side.
    theirs = z["finetune_bin_np1234"]
    top = np.concatenate([row[1:][d > 0] for row, d in zip(batch["values"], dense, strict=True)])
    assert (theirs <= top).all()
    assert (batch["mask"].sum(1) == int(0.4 * (len(genes) + 1))).all()
    assert (z["finetune_all_masked"] == -1).sum(1).tolist() == [int(0.4 * 128)] * len(dense)
    assert 0.2 < batch["mask"][:, 0].mean() < 0.6  # theirs: 81 of 200


def test_tahoe_bins(data: Tokens, engine: str) -> None:
    z = data.load("tx1")
    vocabulary = data.vocabulary(z["gene_token"], **{"<pad>": 0, "<cls>": 1})
    for side, name in (("left", "bin_right0"), ("one", "bin_right1")):
        recipe = tokens.tahoe_x1(vocabulary, length=len(data.genes) + 1, side=side)
        batch = tokens.encode(data.counts, recipe, data.genes, engine=engine)
        assert np.array_equal(np.concatenate([v[1:] for v in unpadded(batch, "values")]), z[name])
    logged = tokens.tahoe_x1(vocabulary, length=len(data.genes) + 1, values="log1p")
    batch = tokens.encode(data.counts, logged, data.genes, engine=engine)
    ours = np.concatenate([v[1:] for v in unpadded(batch, "values")])[: len(z["log_transform_f32"])]
    # torch's float32 log1p is within one unit in the last place; ours is the nearest float32.
    assert (np.abs(ours - z["log_transform_f32"]) <= 2 * np.spacing(ours)).all()


def test_tahoe_inference(data: Tokens, engine: str) -> None:
    z = data.load("tx1")
    n, width = z["inference_truncate_gene"].shape
    vocabulary = data.vocabulary(z["gene_token"], **{"<pad>": 0, "<cls>": 1})
    recipe = tokens.tahoe_x1(vocabulary, length=int(z["max_length"]), sampling=False)
    batch = tokens.encode(data.rows(z["collate_rows"][:n]), recipe, data.genes, engine=engine)
    for ours, theirs in (("input_ids", "gene"), ("values", "expr"), ("counts", "expr_raw")):
        assert np.array_equal(batch[ours][:, :width], z[f"inference_truncate_{theirs}"])


@pytest.mark.parametrize("reference", [False, True])
def test_tahoe_masks(data: Tokens, engine: str, reference: bool) -> None:
    z = data.load("tx1")
    n, width = z["train_gene"].shape
    vocabulary = data.vocabulary(z["gene_token"], **{"<pad>": 0, "<cls>": 1})
    mask = tokens.MaskValues(0.5, exact=True, reference_mask_range=reference)
    recipe = tokens.tahoe_x1(vocabulary, length=int(z["max_length"]), mask=mask)
    batch = tokens.encode(data.rows(z["collate_rows"][:n]), recipe, data.genes, engine=engine)
    n_genes = batch["lengths"] - 1
    if reference:
        assert batch["mask"].sum(1).tolist() == z["train_gen_mask"].sum(1).tolist()
        last = batch["lengths"] - 1
        assert not batch["mask"][np.arange(n), last].any()
    assert batch["mask"].sum(1).tolist() == ((n_genes - reference) * 0.5).astype(int).tolist()
    assert (batch["masked_values"][batch["mask"]] == -1).all()
    assert np.array_equal(np.where(batch["mask"], batch["values"], batch["masked_values"]), batch["values"])
    assert batch["input_ids"].shape == (n, width)


def test_tahoe_unexpressed_drugs_and_ratios(small: Tokens, engine: str) -> None:
    z = small.load("tx1")
    vocabulary = small.vocabulary(z["gene_token"], **{"<pad>": 0, "<cls>": 1, "<mask>": 2, "<drug>": 3})
    rows = small.rows(z["collate_rows"])
    n = rows.shape[0]
    length = int(z["max_length"])
    filled = tokens.tahoe_x1(
        vocabulary,
        length=length,
        unexpressed=True,
        mask=tokens.MaskValues(0.5, exact=True, reference_mask_range=True),
    )
    batch = tokens.encode(rows, filled, small.genes, engine=engine)
    theirs = z["unexpressed_gene"], z["unexpressed_expr_target"]
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape == theirs[0].shape
    assert np.array_equal((batch["values"] == 0).sum(1), (theirs[1] == 0).sum(1))
    assert batch["mask"].sum(1).tolist() == z["unexpressed_gen_mask"].sum(1).tolist()
    for ids in batch["input_ids"]:
        assert len(set(ids.tolist())) == length
    drugs = tokens.ObsTokens("drug", {"drugA": 5, "drugB": 6}, unknown=0)
    names = np.array(["drugA", "drugB", "unknown"])[z["collate_rows"] % 3]
    recipe = tokens.tahoe_x1(
        vocabulary,
        length=length,
        drug=drugs,
        mask=tokens.MaskValues(0.5, exact=True, reference_mask_range=True),
    )
    batch = tokens.encode(rows, recipe, small.genes, obs={"drug": names}, engine=engine)
    assert (batch["input_ids"][:, :2] == [1, 3]).all()
    assert (batch["values"][:, :2] == -2).all()
    assert (z["drug_gene"][:, :2] == [1, 3]).all()
    same = {int(b): int(a) for a, b in zip(batch["drug_ids"], z["drug_drug_ids"], strict=True)}
    assert [same[int(b)] for b in z["drug_drug_ids"]] == batch["drug_ids"].tolist()
    assert batch["mask"].sum(1).tolist() == z["drug_gen_mask"].sum(1).tolist()
    several = tokens.tahoe_x1(vocabulary, length=length, mask=(0.25, 0.5, 0.75))
    batch = tokens.encode(rows, several, small.genes, engine=engine)
    share = batch["mask"].sum(1) / np.maximum(batch["lengths"] - 1, 1)
    long = batch["lengths"] > 50
    chosen = np.abs(share[long, None] - [0.25, 0.5, 0.75]).argmin(1)
    assert (np.bincount(chosen, minlength=3) > n * 0.15).all()


def test_ragged_helper() -> None:
    assert [row.tolist() for row in ragged(np.arange(3), np.array([0, 2, 2, 3]))] == [[0, 1], [], [2]]
