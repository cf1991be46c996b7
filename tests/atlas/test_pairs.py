"""Any two or three files, ingested at once or later, with default options, against a plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas

N_GENES = 9
ENSEMBL = [f"ENSG{i:011d}" for i in range(N_GENES)]
SYMBOLS = ["TP53", "MYC", "ACTB", "GAPDH", "CD3E", "CD4", "CD8A", "KIT", "AXL"]
NAMINGS = ("symbols", "lower", "ensembl", "versions", "positions")
KINDS = ("int", "gaps", "big", "fraction", "bool", "text", "category", "missing")  # anndata writes no times
MATRICES = ("counts in X", "counts in raw", "counts in a layer")


def named(naming: str, genes: Sequence[int]) -> list[str]:
    """The names of some genes in one naming."""
    if naming == "positions":
        return [str(i) for i in range(len(genes))]
    names = {
        "symbols": SYMBOLS,
        "lower": [name.lower() for name in SYMBOLS],
        "ensembl": ENSEMBL,
        "versions": [f"{uid}.{i + 1}" for i, uid in enumerate(ENSEMBL)],
    }[naming]
    return [names[gene] for gene in genes]


def column(kind: str, n: int, seed: int) -> list[Any]:
    """Values of an obs column as a person means them, None where there is none."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 5, n).tolist()
    result: list[Any] = {
        "int": whole,
        "gaps": [None if i == 0 else v for i, v in enumerate(whole)],
        "big": [2**60 + v for v in whole],
        "fraction": [v + 0.5 for v in whole],
        "bool": [v > 2 for v in whole],
        "text": [f"t{v}" for v in whole],
        "category": [f"t{v}" for v in whole],
        "missing": [None] * n,
    }[kind]
    return result


def stored(kind: str, values: list[Any]) -> Any:
    """The values as pandas and anndata users have them."""
    if kind in ("gaps", "missing"):
        return np.array([math.nan if v is None else v for v in values], float)
    if kind == "category":
        return pd.Categorical(values)
    return np.array(values, object) if kind == "text" else pd.Series(values).to_numpy()


@dataclasses.dataclass(frozen=True)
class File:
    """A file, and what it means."""

    genes: tuple[int, ...]
    index: str
    columns: tuple[str, ...]
    matrix: str
    form: str
    obs: dict[str, str]
    n: int
    seed: int

    @property
    def counts(self) -> np.ndarray:
        return np.random.default_rng(self.seed).poisson(1.0, (self.n, len(self.genes))).astype(np.float32)

    @property
    def cells(self) -> list[str]:
        return [f"file{self.seed}cell{i}" for i in range(self.n)]

    def values(self, name: str) -> list[Any]:
        return column(self.obs[name], self.n, self.seed)

    def write(self, path: Path) -> None:
        counts = self.counts
        make = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[self.form]
        obs = {name: stored(kind, self.values(name)) for name, kind in self.obs.items()}
        var = {f"column {naming}": named(naming, self.genes) for naming in self.columns}
        adata = anndata.AnnData(
            make(counts),
            obs=pd.DataFrame(obs, index=self.cells),
            var=pd.DataFrame(var, index=named(self.index, self.genes)),
        )
        if self.matrix == "counts in raw":
            adata.raw = adata
        if self.matrix == "counts in a layer":
            adata.layers["counts"] = make(counts)
        if self.matrix != "counts in X":
            # Every cell has a first value of its own, so that this can be told from counts.
            adata.X = make((np.log1p(counts) + np.float32(0.25)).astype(np.float32))
        adata.write_h5ad(path)


def identified(files: Sequence[File]) -> list[str]:
    """The naming by which each file's genes are told apart: docs/columns.md, rules 4 and 5."""
    stable = [[name for name in (f.index, *f.columns) if name in ("ensembl", "versions")] for f in files]
    if all(stable):
        chosen: list[Any] = []
        seen: set[Any] = set()
        for file, names in zip(files, stable, strict=True):
            ranked = sorted(names, key=lambda name: -len(seen & set(named(name, file.genes))))
            chosen.append(ranked[0])
            seen |= set(named(ranked[0], file.genes))
        return chosen
    if all(f.index != "positions" for f in files):
        return [f.index for f in files]
    shared = [name for name in files[0].columns if all(name in f.columns for f in files)]
    if shared:
        return [shared[0]] * len(files)
    return [
        f.index if f.index != "positions" else next(iter(sorted(f.columns, key=_likely)), "positions")
        for f in files
    ]


def _likely(naming: str) -> bool:
    return naming not in ("ensembl", "versions")


def meaning(kind: str, values: list[Any]) -> str | None:
    """What a column holds; None without any value."""
    if all(value is None for value in values):
        return None
    return {"gaps": "int", "category": "text"}.get(kind, kind)


def joined(kinds: Sequence[str], columns: Sequence[list[Any]]) -> tuple[list[list[Any]], int]:
    """Values of a column of several files in the type that holds all, and how many files have one."""
    state: str | None = None
    done: list[list[Any]] = []
    for kind, values in zip(kinds, columns, strict=True):
        new = meaning(kind, values)
        pair = {state, new} - {None}
        if pair == {"big", "fraction"}:
            return done, len(done)
        done.append(values)
        if len(pair) == 2 and pair != {"int", "big"}:
            change: Any = str if "text" in pair else float if "fraction" in pair else int
            done = [[None if v is None else change(v) for v in one] for one in done]
        # The type that the columns have now.
        state = next((k for k in ("text", "fraction", "big", "int", "bool") if k in pair), state)
    return done, len(done)


def plain(value: Any) -> Any:
    return None if value is None or value is pd.NaT or value is pd.NA or value != value else value


@st.composite
def a_file(draw: st.DrawFn, seed: int) -> File:
    genes = draw(st.lists(st.integers(0, N_GENES - 1), min_size=2, max_size=6, unique=True))
    index = draw(st.sampled_from(NAMINGS))
    columns = draw(st.lists(st.sampled_from(NAMINGS[:4]), max_size=2, unique=True))
    obs = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(KINDS), max_size=2))
    matrix = draw(st.sampled_from(MATRICES))
    form = draw(st.sampled_from(["csr", "csc", "dense"]))
    columns = [name for name in columns if name != index]
    return File(tuple(genes), index, tuple(columns), matrix, form, obs, draw(st.integers(2, 4)), seed)


QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example is small as it comes; shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(first=a_file(1), second=a_file(2))
def test_any_two_files(first: File, second: File, caplog: pytest.LogCaptureFixture) -> None:
    check_together([first, second], [], caplog)


@QUICK
@given(first=a_file(1), second=a_file(2), third=a_file(3), together=st.integers(1, 3))
def test_any_three_files_at_once_or_later(
    first: File, second: File, third: File, together: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = [first, second, third]
    check_together(files[:together], files[together:], caplog)


@pytest.mark.parametrize("lacking", ["cells", "genes"])
def test_an_empty_file_among_others(lacking: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused; the files before it are added, and its genes have no say."""
    first = File((0, 1, 2), "symbols", ("ensembl",), "counts in X", "csr", {"a": "int"}, 3, 1)
    empty = dataclasses.replace(first, index="positions", columns=(), seed=2)
    empty = dataclasses.replace(empty, n=0) if lacking == "cells" else dataclasses.replace(empty, genes=())
    third = dataclasses.replace(first, genes=(1, 2, 5), seed=3)
    check_together([first, empty], [third], caplog)
    check_together([empty], [first, third], caplog)


def check_together(files: list[File], later: list[File], caplog: pytest.LogCaptureFixture) -> None:
    """Ingest `files` with one command, then each of `later` with one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        atlas = Path(folder, "A")
        added: list[File] = []
        for batch in [files, *([file] for file in later)]:
            paths = [Path(folder, f"{file.seed}.h5ad") for file in batch]
            for file, path in zip(batch, paths, strict=True):
                file.write(path)
            caplog.clear()
            error = io.StringIO()
            with contextlib.redirect_stderr(error):
                status = cli.main(["ingest", *map(str, paths), "--atlas", str(atlas)])
            said = caplog.text + error.getvalue()
            taken = list(itertools.takewhile(lambda file: file.n and file.genes, batch))
            n = min([len(added) + len(taken), *(joined_column(name, added + taken)[1] for name in "ab")])
            whole = taken[: n - len(added)]
            assert status == (0 if len(whole) == len(batch) else 1), said
            if len(whole) < len(taken):
                (refused,) = {name for name in "ab" if joined_column(name, added + taken)[1] == n} or {""}
                assert f"column {refused!r}" in said
                assert "--obs-type" in said
            elif len(taken) < len(batch):
                assert "nothing to ingest" in said
            if batch is files and whole:
                few_said(identified(taken), taken, said)
            added += whole
        if not added:
            assert not atlas.exists()
            return
        checked = RaggedAtlas.checkout_latest(atlas)
        adata = checked.query().to_anndata()
        rows = checked.list_datasets().set_index("source_name")["feature_id_column"]
    chosen = [str(rows[f"{file.seed}.h5ad"]) for file in added]
    namings = [
        file.index if column == "index" else column.removeprefix("column ")
        for column, file in zip(chosen, added, strict=True)
    ]
    at_once = [file for file in files if file.n and file.genes]
    n_first = sum(file in files for file in added)
    assert namings[:n_first] == identified(at_once)[:n_first]
    check_later(namings, added, n_first)
    check_content(adata, added, namings, said)


def joined_column(name: str, files: Sequence[File]) -> tuple[list[list[Any]], int]:
    """The values of an obs column of some files, joined."""
    kinds = [file.obs.get(name, "missing") for file in files]
    columns = [file.values(name) if name in file.obs else [None] * file.n for file in files]
    return joined(kinds, columns)


def few_said(namings: Sequence[str], files: Sequence[File], said: str) -> None:
    """A file that shares less than half of the smaller set with those before it is named."""
    seen: set[str] = set()
    few = False
    for naming, file in zip(namings, files, strict=True):
        ids = set(named(naming, file.genes))
        few |= bool(seen) and len(ids & seen) < min(len(ids), len(seen)) / 2
        seen |= ids
    assert ("share few genes" in said) == few, said


def check_later(namings: Sequence[str], files: Sequence[File], n_first: int) -> None:
    """A file that comes to an atlas is identified by what shares most with it, never by positions."""
    seen: set[str] = set()
    for i, (naming, file) in enumerate(zip(namings, files, strict=True)):
        own = [name for name in (file.index, *file.columns) if name != "positions"] or ["positions"]
        shared = {name: len(seen & set(named(name, file.genes))) for name in own}
        if i >= n_first and seen:
            assert naming in own
            assert shared[naming] == max(shared.values())
        seen |= set(named(naming, file.genes))


def check_content(adata: anndata.AnnData, files: list[File], namings: list[str], said: str) -> None:
    """Genes, counts and obs columns of every file."""
    ids = [named(naming, file.genes) for naming, file in zip(namings, files, strict=True)]
    assert set(adata.var_names) == {uid for each in ids for uid in each}, said
    dense = pd.DataFrame(adata.X.toarray(), index=adata.obs["obs_name"], columns=adata.var_names)
    for file, uids in zip(files, ids, strict=True):
        assert np.array_equal(dense.loc[file.cells, uids].to_numpy(), file.counts)
        others = [uid for uid in adata.var_names if uid not in uids]
        assert not dense.loc[file.cells, others].to_numpy().any()
    obs = adata.obs.set_index("obs_name")
    for name in sorted({name for file in files for name in file.obs}):
        values, n = joined_column(name, files)
        assert n == len(files)
        for file, wanted in zip(files, values, strict=True):
            if name not in obs:
                assert not any(v is not None for v in wanted)
                continue
            got = [plain(v) for v in obs.loc[file.cells, name].tolist()]
            assert got == wanted, (name, obs[name].dtype, [f.obs.get(name) for f in files])
            assert [type(v) is bool for v in got] == [type(v) is bool for v in wanted]


def test_files_of_several_modalities_are_chosen_for_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As .h5ad files are: positions in one, ids in the other; and with a file of one matrix beside them."""
    genes = ([0, 2, 4, 5], [1, 2, 4, 6], [0, 2, 6, 7])
    proteins = pd.DataFrame(index=["CD3", "CD4", "CD8"])
    truth: dict[str, dict[str, float]] = {}
    for i, own in enumerate(genes):
        file = File(tuple(own), "positions" if i != 1 else "ensembl", (), "counts in X", "csr", {}, 3, i)
        var = pd.DataFrame(index=named(file.index, own))
        if i != 1:
            var["whatever"] = named("ensembl", own)
        obs = pd.DataFrame(index=file.cells)
        rna = anndata.AnnData(sp.csr_matrix(file.counts), obs=obs, var=var)
        for cell, row in zip(file.cells, file.counts, strict=True):
            truth[cell] = {uid: v for uid, v in zip(named("ensembl", own), row, strict=True) if v}
        if i == 2:
            rna.write_h5ad(tmp_path / "2.h5ad")
            continue
        adt = anndata.AnnData(np.full((3, 3), i + 1, np.float32), obs=obs, var=proteins)
        mudata.MuData({"rna": rna, "prot": adt}).write_h5mu(tmp_path / f"{i}.h5mu")
    files = [str(tmp_path / name) for name in ("0.h5mu", "1.h5mu", "2.h5ad")]
    assert cli.main(["ingest", *files, "--atlas", str(tmp_path / "A")]) == 0
    said = "".join(capsys.readouterr())
    assert "rna: matrix X: counts, features by var['whatever'] (ids of a database)" in said
    assert "share few genes" not in said
    query = RaggedAtlas.checkout_latest(tmp_path / "A").query()
    adata = query.feature_spaces("gene_expression").to_anndata()
    assert set(adata.var_names) == {ENSEMBL[g] for own in genes for g in own}
    dense = pd.DataFrame(adata.X.toarray(), index=adata.obs["obs_name"], columns=adata.var_names)
    assert {cell: {u: v for u, v in row.items() if v} for cell, row in dense.iterrows()} == truth
