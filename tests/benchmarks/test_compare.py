"""The peer comparison: its data, its checks, its measure of mixing, and one small run from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from benchmarks import compare, mixing
from benchmarks.compare_report import report
from benchmarks.datasets import SpecA, SpecB, blocks, copied, write
from benchmarks.peers import protocol
from benchmarks.peers.protocol import Csr, Loader, Rows, Task, fingerprints, gene_weights


def csr(matrix: np.ndarray) -> Csr:
    x = sparse.csr_matrix(matrix)
    return Csr(x.indptr, x.indices, x.data)


@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(1, 12), st.integers(1, 30)))
@settings(max_examples=50, deadline=None)
def test_fingerprints_do_not_depend_on_layout_or_order(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    dense = (rng.poisson(0.5, size=shape) * rng.integers(1, 900, size=shape)).astype(np.float32)
    weights = gene_weights(shape[1])
    rows = csr(dense)
    found = fingerprints(rows, weights)
    # Reversed within each row, integers, and cut out of a longer matrix whose pointers start above 0.
    backwards = [np.arange(a, b)[::-1] for a, b in zip(rows.indptr[:-1], rows.indptr[1:], strict=True)]
    turn = np.concatenate(backwards).astype(int)
    pad = np.zeros(3, int)
    shifted = Csr(
        rows.indptr + 3,
        np.concatenate((pad, rows.indices[turn])),
        np.concatenate((pad, rows.values[turn].astype(np.uint16))),
    )
    np.testing.assert_array_equal(found, fingerprints(dense, weights))
    np.testing.assert_array_equal(found, fingerprints(shifted, weights))


def test_fingerprints_tell_a_moved_and_a_changed_value() -> None:
    dense = np.random.default_rng(0).poisson(1.0, (50, 40)).astype(np.float32)
    weights = gene_weights(40)
    truth = fingerprints(dense, weights)
    changed = dense.copy()
    changed[3, 7] += 1
    moved = dense.copy()
    moved[5] = np.roll(moved[5], 1)
    for wrong, row in ((changed, 3), (moved, 5)):
        found = fingerprints(wrong, weights)
        assert np.flatnonzero(found != truth).tolist() == [row]
        assert protocol.unknown_rows(found, truth) == 1


def test_columns_in_another_order_are_the_same_rows() -> None:
    dense = np.random.default_rng(1).poisson(0.3, (20, 10)).astype(np.float32)
    genes = [f"g{k}" for k in range(10)]
    order = np.random.default_rng(2).permutation(10)
    loader = Loader(20, lambda _: iter(()), columns=lambda: [genes[k] for k in order])
    weights = protocol.column_weights(loader, genes)
    np.testing.assert_array_equal(
        fingerprints(dense[:, order], weights), fingerprints(dense, gene_weights(10))
    )


def test_rows_are_found_again_and_equal_ones_handed_out_in_turn() -> None:
    truth = np.array([5, 9, 5, 1, 9], np.uint64)
    rows = mixing.rows_of(np.array([9, 5, 9, 5, 1, 7], np.uint64), truth)
    assert sorted(rows[:5].tolist()) == [0, 1, 2, 3, 4]
    assert truth[rows[:5]].tolist() == [9, 5, 9, 5, 1]
    assert rows[5] == -1


@pytest.mark.parametrize(("batch", "n_cells"), [(64, 4_096), (512, 6_400)])
def test_mixing_of_known_orders(batch: int, n_cells: int) -> None:
    rng = np.random.default_rng(0)
    sizes = np.full(n_cells // batch, batch)
    kept = sizes.sum()
    uniform = mixing.quality(rng.permutation(n_cells)[:kept], sizes, n_cells)
    stored = mixing.quality(np.arange(kept), sizes, n_cells)
    assert uniform == pytest.approx(1.0, abs=0.02)
    # Batches in stored order see batch / (n_cells / labels) labels each, and two at least by their edges.
    labels_per_batch = max(1.0, batch * mixing.LABELS / n_cells)
    assert stored == pytest.approx(np.log2(labels_per_batch) / 5.8, abs=0.15)


def test_differences_count_copies() -> None:
    truth = np.array([5, 9, 5, 1], np.uint64)
    assert compare.differences(truth[::-1], truth) == (0, 0)
    assert compare.differences(np.array([5, 1, 1, 7], np.uint64), truth) == (2, 2)
    assert compare.differences(np.array([9], np.uint64), truth) == (0, 3)


def test_entropy_of_a_batch() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(mixing.entropies(labels, np.array([4, 4]), 3), [1.0, 0.0])


def test_spec_a_is_what_was_published() -> None:
    rows = next(blocks(SpecA(), 512, 3))
    again = next(blocks(SpecA(), 512, 3))
    np.testing.assert_array_equal(rows.values, again.values)
    per_cell = np.diff(rows.indptr)
    # 512 cells: the mean has a standard error of 1.6, the deviation of a binomial is 36.
    assert per_cell.mean() == pytest.approx(1_400, abs=8)
    assert per_cell.std() == pytest.approx(36, abs=6)
    assert rows.values.min() == 2
    assert rows.values.mean() == pytest.approx(1 + 1 / 0.3, rel=0.01)


def test_spec_b_has_the_moments_of_the_model() -> None:
    model = SpecB()
    rows = next(blocks(model, 1_024, 0))
    totals = np.add.reduceat(rows.values, rows.indptr[:-1])
    assert np.median(totals) == pytest.approx(model.median_depth, rel=0.1)
    assert rows.values.min() == 1
    shares = np.random.default_rng(model.profile_seed).lognormal(0.0, model.mean_sd, model.n_genes)
    shares /= shares.sum()
    seen = np.bincount(rows.indices, weights=rows.values, minlength=model.n_genes) / totals.sum()
    for gene in np.argsort(shares)[-5:]:
        assert seen[gene] == pytest.approx(shares[gene], rel=0.1)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_any_h5ad_becomes_the_same_source(tmp_path: Path, layout: str) -> None:
    import anndata

    dense = np.random.default_rng(0).poisson(0.4, (70, 15)).astype(np.float32)
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[layout](dense)
    anndata.AnnData(matrix).write_h5ad(tmp_path / "in.h5ad", compression="gzip")
    genes, rows = copied(tmp_path / "in.h5ad", 50)
    data = write(tmp_path / "out", genes, rows)
    source = protocol.Source(data.h5ad)
    np.testing.assert_array_equal(source.rows(0, 50).toarray(), dense[:50])
    np.testing.assert_array_equal(source.rows(13, 20).toarray(), dense[13:20])
    assert (data.n_cells, data.n_genes, data.nnz) == (50, 15, int(np.count_nonzero(dense[:50])))
    assert source.genes() == genes
    assert source.groups(3) == [(0, 16), (16, 33), (33, 50)]
    np.testing.assert_array_equal(np.load(data.truth), fingerprints(dense[:50], gene_weights(15)))
    assert anndata.read_h5ad(data.h5ad).shape == (50, 15)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    dense = np.random.default_rng(0).poisson(0.4, (100, 15)).astype(np.float32)
    data = write(tmp_path, [f"g{k}" for k in range(15)], iter([csr(dense)]))
    return data.h5ad, np.load(data.truth), dense


def test_measuring_counts_whole_windows_and_checks_rows(
    small: tuple[Path, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_PATIENCE", np.inf), ("_FIRST", 3), ("_STEADY", np.inf)):
        monkeypatch.setattr(protocol, name, value)
    source, truth, dense = small
    seen: list[tuple[int, int]] = []

    def opened(task: Task) -> Loader:
        def epoch(number: int) -> Iterator[Rows]:
            for first in range(0, 100, task.batch):
                seen.append((number, first))
                yield dense[first : first + task.batch]

        return Loader(100, epoch, window=40)

    task = Task(Path(), "any", 10, "dense")
    result = protocol.measure(opened, task, 1e-9, protocol.Source(source), truth)
    # The first batches; then twice the first border of what is read in one go, after no time at all.
    assert seen == [(0, 0), (0, 10), (0, 20), *((epoch, k) for epoch in (1, 2) for k in range(0, 40, 10))]
    assert (result["checked_rows"], result["wrong_rows"], result["steady"]) == (10, 0, True)
    assert (len(result["windows"]), result["first_batches"]) == (2, 3)
    assert 0 < result["first_batch_s"] <= result["first_batches_s"]
    monkeypatch.setattr(protocol, "_STEADY", -1.0)
    result = protocol.measure(opened, task, 1e-9, protocol.Source(source), truth)
    assert (len(result["windows"]), result["steady"]) == (10, False)
    dense[30:40] += 1
    result = protocol.measure(opened, task, 1e-9, protocol.Source(source), truth, warm=True)
    assert result["wrong_rows"] == 10


def test_datasets_of_an_atlas_may_have_their_genes_in_different_orders(
    small: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    source, _, dense = small
    names = [f"g{k}" for k in range(15)]
    for orders in ("one", "mixed"):
        found = list(protocol.Source(source).datasets({"groups": "3", "gene_orders": orders}))
        assert [first for first, _, _ in found] == [0, 33, 66]
        assert [genes == names for _, _, genes in found] == [True] + [orders == "one"] * 2
        rows = [part.toarray()[:, np.argsort([names.index(g) for g in genes])] for _, part, genes in found]
        np.testing.assert_array_equal(np.concatenate(rows), dense)


def test_verifying_reports_an_unfinished_epoch(small: tuple[Path, np.ndarray, np.ndarray]) -> None:
    _, truth, dense = small
    loader = Loader(100, lambda _: (dense[k : k + 25] for k in range(0, 100, 25)))
    genes = [f"g{k}" for k in range(15)]
    found, sizes, complete = protocol.verify(loader, 60.0, genes)
    assert complete
    np.testing.assert_array_equal(found, truth)
    assert sizes.tolist() == [25] * 4
    found, sizes, complete = protocol.verify(loader, 0.0, genes)
    assert (len(found), sizes.tolist(), complete) == (25, [25], False)


def test_every_variant_says_what_it_is() -> None:
    for peer in compare.PEERS.values():
        assert peer.variants
        for variant in peer.variants.values():
            assert variant.order in ("random", "stream", "floor")
            assert len(variant.settings) > 10


def test_only_names_what_exists() -> None:
    assert [c.name for c in compare.chosen(["ours:none", "memory"])] == [
        "ours:none",
        "memory:scipy",
        "memory:copy",
    ]
    with pytest.raises(SystemExit, match="no such loader; there are"):
        compare.chosen(["nobody"])


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loader that works, floors, and a peer whose interpreter is missing: skipped, said so, not failed."""
    arguments = ["--cells", "300", "--repeat", "2", "--seconds", "0.01", "--batch-sizes", "16", "64",
                 "--mixing-batch", "64", "--only", "memory", "scdl", "--python", "scdl=/nowhere/python",
                 "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]  # fmt: skip
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "scdl: skipped (/nowhere/python: No such file or directory)" in printed
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["skipped"] == {"scdl": "/nowhere/python: No such file or directory"}
    assert content["checks"]["memory:scipy"]["checked"] == 300
    assert content["checks"]["memory:scipy"]["wrong"] == 0
    assert content["checks"]["memory:scipy"]["mixing"] == pytest.approx(1.0, abs=0.1)
    measured = {(r["contender"], r["layout"], r["batch"]) for r in content["results"]}
    variants = ("memory:scipy", "memory:copy")
    assert measured == {(v, layout, b) for v in variants for layout in ("csr", "dense") for b in (16, 64)}
    assert all(len(r["runs"]) == 2 and r["cells_per_s"]["median"] > 0 for r in content["results"])
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert report(content) in printed


def test_wrong_rows_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that reads other data than the source it is held against."""
    arguments = ["--cells", "200", "--repeat", "1", "--seconds", "0.01", "--batch-sizes", "16", "--layouts",
                 "csr", "--mixing-batch", "16", "--only", "memory:scipy", "--work", str(tmp_path / "work"),
                 "--out", str(tmp_path / "out")]  # fmt: skip
    generate = compare.generate

    def tampered(options: object) -> object:
        data, what = generate(options)  # type: ignore[arg-type]
        with h5py.File(data.h5ad, "r+") as file:
            file["X/data"][0] += 1
        return data, what

    monkeypatch.setattr(compare, "generate", tampered)
    assert compare.main(arguments) == 1
    assert "WRONG" in (tmp_path / "out" / "compare.txt").read_text()


def test_an_interpreter_must_be_named_after_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--python", f"nobody={sys.executable}"])
    assert "is not NAME=PATH with a name of" in capsys.readouterr().err


def test_genes_whose_index_is_a_group(tmp_path: Path) -> None:
    """As anndata writes the index of pandas 3: values, and a mask."""
    import anndata
    import pandas as pd

    var = pd.DataFrame(index=pd.Index(["a", "b", "c"], dtype="string"))
    adata = anndata.AnnData(sparse.csr_matrix(np.eye(2, 3, dtype=np.float32)), var=var)
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "x")
    with h5py.File(tmp_path / "x") as file:
        assert isinstance(file["var"][file["var"].attrs["_index"]], h5py.Group)
    assert protocol.Source(tmp_path / "x").genes() == ["a", "b", "c"]
