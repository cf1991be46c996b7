"""Any two files, ingested with default options: genes, values and obs columns against a plain model."""

from __future__ import annotations

import contextlib
import dataclasses
import io
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


def joined(kinds: Sequence[str], columns: Sequence[list[Any]]) -> list[list[Any]] | None:
    """Values of a column of two files in the type that holds both; None where there is no such type."""
    of = {"gaps": "int", "category": "text"}
    found = {
        of.get(kind, kind)
        for kind, values in zip(kinds, columns, strict=True)
        if any(v is not None for v in values)
    }
    if len(found) <= 1 or found == {"int", "big"}:
        return list(columns)
    if found == {"big", "fraction"}:
        return None
    if "text" in found:
        return [[None if v is None else str(v) for v in values] for values in columns]
    number = float if "fraction" in found else int
    return [[None if v is None else number(v) for v in values] for values in columns]


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


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example is small as it comes; shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(first=a_file(1), second=a_file(2))
def test_any_two_files(first: File, second: File, caplog: pytest.LogCaptureFixture) -> None:
    check_together([first, second], caplog)


def check_together(files: list[File], caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.h5ad") for i in range(len(files))]
        for file, path in zip(files, paths, strict=True):
            file.write(path)
        caplog.clear()
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            status = cli.main(["ingest", *map(str, paths), "--atlas", str(Path(folder, "A"))])
        said = caplog.text + error.getvalue()
        names = sorted({name for file in files for name in file.obs})
        expected_obs: dict[str, list[list[Any]] | None] = {}
        for name in names:
            kinds = [file.obs.get(name, "missing") for file in files]
            columns = [file.values(name) if name in file.obs else [None] * file.n for file in files]
            expected_obs[name] = joined(kinds, columns)
        if refused := [name for name, values in expected_obs.items() if values is None]:
            assert status == 1, said
            assert f"column {refused[0]!r}" in said
            assert "--obs-type" in said
            return
        assert status == 0, said
        adata = RaggedAtlas.checkout_latest(Path(folder, "A")).query().to_anndata()

    chosen = identified(files)
    ids = [named(naming, file.genes) for naming, file in zip(chosen, files, strict=True)]
    assert set(adata.var_names) == {uid for each in ids for uid in each}, said
    dense = pd.DataFrame(adata.X.toarray(), index=adata.obs["obs_name"], columns=adata.var_names)
    for file, uids in zip(files, ids, strict=True):
        assert np.array_equal(dense.loc[file.cells, uids].to_numpy(), file.counts)
        others = [uid for uid in adata.var_names if uid not in uids]
        assert not dense.loc[file.cells, others].to_numpy().any()
    smaller = min(map(len, map(set, ids)))
    few = len(set(ids[0]) & set(ids[1])) < smaller / 2
    assert ("share few genes" in said) == few, said
    obs = adata.obs.set_index("obs_name")
    for name, values in expected_obs.items():
        assert values is not None
        for file, wanted in zip(files, values, strict=True):
            if name not in obs:
                assert not any(v is not None for v in wanted)
                continue
            got = [plain(v) for v in obs.loc[file.cells, name].tolist()]
            assert got == wanted, (name, obs[name].dtype)
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
