"""Expressed genes, equal to what TranscriptFormer, scFoundation and scPRINT make of the same cells."""

from __future__ import annotations

import numpy as np

from hbx_gpu import tokens
from tests.tokens.fixtures import Tokens, equal_up_to_ties, unpadded

SPECIALS = {"unknown": 0, "[START]": 1, "[END]": 2, "[RD]": 3, "[CELL]": 4, "[PAD]": 5, "[MASK]": 6}


def transcriptformer(data: Tokens, z: dict[str, np.ndarray], **options: object) -> tokens.ExpressedGenes:
    return tokens.transcriptformer(
        data.vocabulary(z["gene_token"], **SPECIALS),
        **({"length": int(z["max_len"])} | options),  # type: ignore[arg-type]
    )


def test_transcriptformer(data: Tokens, engine: str) -> None:
    z = data.load("transcriptformer")
    n = len(z["default_tokens"])
    assay = tokens.ObsTokens("assay", {"10x 3' v3": 2, "Smart-seq2": 1}, unknown=0)
    rows = data.counts[:n]
    names = np.array(["a", "b", "never seen"])[np.arange(n) % 3]
    assay = tokens.ObsTokens("assay", {"a": int(z["aux"][0, 0]), "b": int(z["aux"][1, 0])}, unknown=0)
    recipe = transcriptformer(data, z, assay=assay)
    batch = tokens.encode(rows, recipe, data.genes, obs={"assay": names}, padding="max_length", engine=engine)
    assert np.array_equal(batch["input_ids"], z["default_tokens"])
    assert np.array_equal(batch["values"], z["default_counts"])
    assert np.array_equal(batch["aux_token_indices"], z["aux"][:n])


def test_transcriptformer_orders(data: Tokens, engine: str) -> None:
    z = data.load("transcriptformer")
    n = len(z["default_tokens"])
    rows = data.counts[:n]
    ordered = tokens.encode(
        rows, transcriptformer(data, z, order="value"), data.genes, padding="max_length", engine=engine
    )
    shuffled = tokens.encode(
        rows, transcriptformer(data, z, order="random"), data.genes, padding="max_length", engine=engine
    )
    everything = tokens.encode(rows, transcriptformer(data, z, length=5000), data.genes)
    counted = tokens.encode(rows, transcriptformer(data, z, length=5000, clip=None), data.genes)
    for i in range(n):
        length = ordered["lengths"][i]
        known = everything["lengths"][i]
        ids = everything["input_ids"][i][:known].tolist()
        count = dict(zip(ids, counted["values"][i].tolist(), strict=False))
        value = dict(zip(ids, everything["values"][i].tolist(), strict=False))
        ours, theirs = (b[i][:length] for b in (ordered["input_ids"], z["sorted_tokens"]))
        assert equal_up_to_ties(ours, theirs, count)
        assert np.array_equal(ordered["values"][i], z["sorted_counts"][i])
        for made, amounts in (
            (shuffled["input_ids"][i], shuffled["values"][i]),
            (z["random_order_torch5_tokens"][i], z["random_order_torch5_counts"][i]),
        ):
            genes = made[made != 5].tolist()
            assert len(set(genes)) == len(genes) == length
            assert [value[g] for g in genes] == amounts[: len(genes)].tolist()


def test_transcriptformer_variants(small: Tokens, engine: str) -> None:
    z = small.load("transcriptformer")
    scaled = tokens.encode(
        small.counts,
        transcriptformer(small, z, normalize_to=1e4, clip=None),
        small.genes,
        padding="max_length",
        engine=engine,
    )
    assert np.array_equal(scaled["input_ids"], z["normalized_tokens"])
    some = ~np.isnan(z["normalized_counts"]).any(1)
    assert np.allclose(scaled["values"][some], z["normalized_counts"][some], rtol=3e-7)
    assert (scaled["values"][~some] == 0).all()  # where theirs is not a number
    wide = transcriptformer(small, z, length=z["wider_than_genes_tokens"].shape[1])
    batch = tokens.encode(small.counts, wide, small.genes, padding="max_length", engine=engine)
    assert np.array_equal(batch["input_ids"], z["wider_than_genes_tokens"])
    assert np.array_equal(batch["values"], z["wider_than_genes_counts"])
    filled = transcriptformer(small, z, order="random", pad_zeros=False)
    batch = tokens.encode(small.counts, filled, small.genes, padding="max_length", engine=engine)
    theirs = z["zeros_kept_random_torch5_tokens"], z["zeros_kept_random_torch5_counts"]
    assert (theirs[0] != 5).all()
    assert batch["attention_mask"].all()
    assert ((batch["values"] > 0).sum(1) == (theirs[1] > 0).sum(1)).all()


def test_scfoundation(data: Tokens, engine: str) -> None:
    z = data.load("scfoundation")
    columns = z["list_column"]
    genes = [data.genes[c] if c >= 0 else f"not-measured-{i}" for i, c in enumerate(columns.tolist())]
    n = len(z["x"])
    recipe = tokens.scfoundation(genes, resolution="t4", pad_id=int(z["pad_token_id"]), reference_drop=True)
    batch = tokens.encode(data.rows(z["rows"][:n]), recipe, data.genes, engine=engine)
    width = z["x"].shape[1]
    ids, values = batch["input_ids"], batch["values"]
    assert np.array_equal(ids[:, :width], z["position_ids"][:, : ids.shape[1]])
    assert np.array_equal(values[:, :width], z["x"][:, : values.shape[1]])
    assert (z["padding"][:, ids.shape[1] :]).all()
    assert np.array_equal(~batch["attention_mask"], z["padding"][:, : ids.shape[1]])
    for resolution, expected in (("a5", 5.0), ("f2", np.log10(2.0))):
        other = tokens.scfoundation(genes, resolution=resolution)
        batch = tokens.encode(data.rows(z["rows"][:n]), other, data.genes, engine=engine)
        ends = batch["lengths"]
        aimed, measured = (batch["values"][np.arange(n), ends - k] for k in (2, 1))
        assert np.allclose(measured, np.log10(z["totals"][:n]), rtol=1e-6)
        assert np.allclose(aimed, measured + expected, rtol=1e-6)


def scprint(data: Tokens, z: dict[str, np.ndarray]) -> dict[str, int]:
    valid = np.flatnonzero(z["valid_gene"])
    return {data.genes[c]: int(z["start_idx"]) + i for i, c in enumerate(valid.tolist())}


def test_scprint(data: Tokens, engine: str) -> None:
    z = data.load("scprint")
    vocabulary, length = scprint(data, z), int(z["max_len"])
    n = len(z["most_expr_x"])
    rows = data.rows(z["rows"][:n])
    most = tokens.encode(
        rows, tokens.scprint(vocabulary, max_len=length, how="most expr"), data.genes, engine=engine
    )
    some = tokens.encode(
        rows, tokens.scprint(vocabulary, max_len=length, how="random expr"), data.genes, engine=engine
    )
    dense = data.rows(z["rows"][:n]).toarray()
    count = {number: dense[:, data.genes.index(gene)] for gene, number in vocabulary.items()}
    for i in range(n):
        value = {number: float(column[i]) for number, column in count.items()}
        expressed = int((most["values"][i] > 0).sum())
        assert equal_up_to_ties(
            most["input_ids"][i][:expressed], z["most_expr_genes_np31"][i][:expressed], value
        )
        assert np.array_equal(most["values"][i], z["most_expr_x"][i])
        for batch, ids, x in (
            (some, some["input_ids"][i], some["values"][i]),
            (None, z["random_expr_genes_np31"][i], z["random_expr_x"][i]),
        ):
            genes = ids.tolist()
            assert len(set(genes)) == len(genes) == min(length, len(vocabulary))
            assert [value[g] for g in genes] == x.tolist()
            n_known = sum(v > 0 for v in value.values())
            assert (x > 0).sum() == min(length, n_known)
            if batch is not None and n_known <= length:  # then neither drew the expressed ones
                assert genes[:n_known] == z["random_expr_genes_np31"][i][:n_known].tolist()


def test_scprint_variants(small: Tokens, engine: str) -> None:
    z = small.load("scprint")
    vocabulary, length = scprint(small, z), int(z["max_len"])
    zeros = tokens.scprint(vocabulary, max_len=length, how="random expr", add_zero_genes=16)
    batch = tokens.encode(small.rows(z["zeros16_rows"]), zeros, small.genes, engine=engine)
    assert batch["input_ids"].shape == z["zeros16_genes_np32"].shape
    assert ((batch["values"] > 0).sum(1) == (z["zeros16_x"] > 0).sum(1)).all()
    rows = small.rows(z["rows"])
    everything = tokens.encode(rows, tokens.scprint(vocabulary, how="all"), small.genes, engine=engine)
    assert (everything["input_ids"] == z["all_genes"]).all()
    dense = rows.toarray()[:, [small.genes.index(gene) for gene in vocabulary]]
    assert np.array_equal(everything["values"], dense)
    logged = tokens.scprint(vocabulary, max_len=length, how="most expr", norm_to=1e4, logp1=True)
    batch = tokens.encode(rows, logged, small.genes, engine=engine)
    assert np.allclose(batch["values"], z["norm_log2_np33_x"], rtol=3e-7)
    binned = tokens.scprint(vocabulary, max_len=length, how="most expr", n_bins=51)
    batch = tokens.encode(rows, binned, small.genes, engine=engine)
    assert np.array_equal(batch["values"], z["bins51_np34_x"])
    assert unpadded(batch)
