"""What a message advises can be done where the user is: options of that very command, or Python's names."""

from __future__ import annotations

import argparse
import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import hbx_gpu
from hbx_gpu import cli
from hbx_gpu._advice import from_command, option, spelled
from hbx_gpu._commands import bench, convert, convert_h5ad_to_scdl, ingest, links, prefetch, repack, stats

ROOT = Path(hbx_gpu.__file__).parent
TABLES: dict[str, list[Mapping[str, str]]] = {
    "ingest": [ingest._FLAGS, ingest._FLAGS_OF_SEVERAL],
    "convert": [convert._FLAGS],
    "repack": [repack._FLAGS],
    "remove": [links.FLAGS],
    "info": [links.FLAGS],
    "bench": [bench._FLAGS],
    "doctor": [],
    "verify": [links.FLAGS],
    "stats": [stats._FLAGS],
    "prefetch": [prefetch._FLAGS],
    "convert_h5ad_to_scdl": [convert_h5ad_to_scdl._FLAGS],
}
# As a message writes an argument of Python, where it does not send the user there.
KEYWORD = re.compile(r"\b[a-z_]{4,}=(True|False|'[^']*'|\.\.\.)(?! in Python)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-zA-Z-]+")


def options_of(command: str) -> set[str]:
    """All options that a command accepts."""
    if command == "convert_h5ad_to_scdl":
        parser = convert_h5ad_to_scdl._parser()
    else:
        (subparsers,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
        assert set(subparsers.choices) == set(TABLES) - {"convert_h5ad_to_scdl"}, "a command without a table"
        parser = subparsers.choices[command]
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("command", TABLES)
def test_every_flag_of_a_table_exists(command: str) -> None:
    for table in TABLES[command]:
        assert {flag.split()[0] for flag in table.values()} <= options_of(command)


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module that are not documentation."""
    tree = ast.parse(path.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


# All but the commands, and what only one of them calls; the doctor speaks of options of other programs.
ELSEWHERE = {"_commands", "_bench", "_doctor", "demo.py", "cli.py"}
LIBRARY = [path for path in sorted(ROOT.rglob("*.py")) if not ELSEWHERE & {*path.parts}]
# What runs under a command that reads files or writes atlases and archives.
UNDER_COMMANDS = [
    p
    for p in LIBRARY
    if p.relative_to(ROOT).parts[0] in ("_identity", "_h5ad", "_untrusted.py", "_paths.py")
    or p.relative_to(ROOT).parts[:2]
    in [("atlas", "_ingest"), ("atlas", "_model"), ("scdl", "_writing"), ("scdl", "_atlases")]
    or p.relative_to(ROOT).parts[:3] in [("scdl", "_sources", "axis.py"), ("scdl", "_format", "values.py")]
]


def test_the_library_names_no_flag_on_its_own() -> None:
    """A flag in a text of the library is wrong in Python, and in commands without it: `option` knows both."""
    chosen = {text for p in LIBRARY for call in calls(p, "spelled") for _, text in _texts(call)}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {flag}"
        for path in LIBRARY
        for line, text in literals(path)
        for flag in FLAG.findall(text)
        # A command as a whole may be named, and so may options of other programs.
        if text not in chosen
        and not re.search("hbx-gpu |--atlas ATLAS'|docker run ", text)
        and path.name != "cuda.py"  # NVRTC's own options
    ]
    assert not found


def test_texts_under_commands_name_no_keyword_on_their_own() -> None:
    keywords = {name for tables in TABLES.values() for table in tables for name in table}
    written = re.compile(rf"\b({'|'.join(sorted(keywords))})=")
    chosen = {text for p in LIBRARY for call in calls(p, "spelled") for _, text in _texts(call)}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in UNDER_COMMANDS
        for line, text in literals(path)
        if written.search(text)
        and text not in chosen
        and "PointerField.declare(" not in text  # a line of a schema class, which is Python in any place
    ]
    assert not found


# What runs under `hbx-gpu bench` and speaks of options that it has.
UNDER_BENCH = [
    p
    for p in LIBRARY + sorted((ROOT / "_bench").rglob("*.py"))
    if p.relative_to(ROOT).parts[0]
    in ("_bench", "_inplace", "_stores", "_storage", "_loading", "_devices.py", "_engine", "_datasets")
    or p.relative_to(ROOT).parts[:2] in [("atlas", "_query"), ("scdl", "_sources")]
]


def test_texts_under_bench_name_no_keyword_of_its_options() -> None:
    """Names of Python's parameters and flags, where the user came through the command."""
    written = re.compile(rf"\b({'|'.join(sorted(bench._FLAGS))})=")
    chosen = {text for p in UNDER_BENCH for call in calls(p, "spelled") for _, text in _texts(call)}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in UNDER_BENCH
        for line, text in literals(path)
        if written.search(text) and text not in chosen
    ]
    assert not found


@pytest.mark.parametrize("command", TABLES)
def test_a_command_names_no_flag_that_it_lacks(command: str) -> None:
    """Texts of a command's module, and of the room that only it calls."""
    own = [ROOT / "_commands" / f"{command}.py"]
    own += sorted((ROOT / "_bench").rglob("*.py")) if command == "bench" else []
    found = {flag for path in own for _, text in literals(path) for flag in FLAG.findall(text)}
    assert found <= options_of(command)


def _texts(call: ast.Call) -> Iterator[tuple[int, str]]:
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_every_option_that_is_advised_is_known() -> None:
    """A name that no command knows is misspelled, or an option that Python alone has."""
    only_python = {"obs_table_name", "span"}
    known = {name for tables in TABLES.values() for table in tables for name in table}
    for path in LIBRARY:
        for call in calls(path, "option"):
            if isinstance(call.args[0], ast.Constant):
                assert call.args[0].value in known | only_python, f"{path}:{call.lineno}"


@pytest.mark.slow
def test_messages_of_bench(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Situations in which it cannot measure."""
    mods = {name: data([f"{name}{i}" for i in range(4)], names="c") for name in ("rna", "prot")}
    mudata.MuData(mods).write_h5mu(tmp_path / "m.h5mu")
    dense = data(["a", "b"])
    dense.X = dense.X.toarray()
    dense.write_h5ad(tmp_path / "dense.h5ad")
    cases: list[tuple[list[Path | str], str]] = [
        ([tmp_path / "m.h5mu"], "--field"),
        ([tmp_path / "m.h5mu", "--field", "nothing"], "rna"),
        ([tmp_path / "dense.h5ad"], "--field or --layer"),
        ([files / "counts.h5ad", "--layer", "nothing"], "has no matrix 'nothing'"),
        ([files / "counts.h5ad", "--seconds", "-1"], "--seconds"),
        ([files / "nothing.h5ad"], "does not exist"),
        ([files / "empty.h5ad"], ""),
    ]
    for args, advice in cases:
        status, text = said("bench", [*args, "--device", "cpu"], capsys)
        assert status == 1, text
        assert advice in text
    if not torch.cuda.is_available():
        status, text = said("bench", [files / "counts.h5ad", "--device", "cuda"], capsys)
        assert status == 1
        assert "--device auto takes the CPU" in text


def test_an_option_that_a_command_lacks_is_pythons() -> None:
    with from_command({"layer": "--layer"}):
        assert option("layer", "raw") == "--layer raw"
        assert option("feature_id", "gene_ids") == "feature_id='gene_ids' in Python"
        assert spelled("add_multimodal", "--modality") == "--modality"
    assert option("layer", "raw") == "layer='raw'"
    assert spelled("add_multimodal", "--modality") == "add_multimodal"


# What is printed


def data(
    genes: list[str], n: int = 12, seed: int = 0, *, log: bool = False, names: str = "c"
) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(2, (n, len(genes))).astype(np.float32))
    if log:
        x.data = (np.log1p(x.data) + 0.1).astype(np.float32)
    obs = pd.DataFrame({"batch": np.arange(n) % 2}, index=[f"{names}{i}" for i in range(n)])
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=genes))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of which each brings another error."""
    folder = tmp_path_factory.mktemp("files")
    genes = [f"ENSG{i:011d}" for i in range(8)]
    data(genes).write_h5ad(folder / "counts.h5ad")
    data(genes, log=True).write_h5ad(folder / "log.h5ad")
    data([f"{g}.3" for g in genes], seed=1, names="d").write_h5ad(folder / "versions.h5ad")
    data(["a", "b", "b", "c"], seed=2).write_h5ad(folder / "repeated.h5ad")
    data(genes)[:0].copy().write_h5ad(folder / "empty.h5ad")
    data(genes)[:, :0].copy().write_h5ad(folder / "no_genes.h5ad")
    return folder


def said(command: str, args: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was printed; what it advises is checked."""
    given = [str(arg) for arg in args]
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        if command == "convert_h5ad_to_scdl":
            status = convert_h5ad_to_scdl.main(given)
        else:
            status = cli.main([command, *given])
    out, err = capsys.readouterr()
    text = out + err
    assert set(FLAG.findall(text)) <= options_of(command), text
    assert not KEYWORD.search(text), text
    return status, text


def test_messages_of_every_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas, archive = tmp_path / "A", tmp_path / "S"

    def run(command: str, *args: object) -> tuple[int, str]:
        return said(command, list(args), capsys)

    status, text = run("ingest", files / "log.h5ad", "--atlas", atlas)
    assert status == 1
    assert "--layer" in text
    assert "--target-layer" in text
    status, text = run("ingest", files / "repeated.h5ad", "--atlas", atlas)
    assert status == 1
    assert "more than once" in text
    assert run("ingest", files / "counts.h5ad", "--atlas", atlas)[0] == 0
    status, text = run("ingest", files / "versions.h5ad", "--atlas", atlas, "--require-shared-genes", "0.5")
    assert status == 1
    assert "--strip-versions" in text
    status, text = run("ingest", files / "counts.h5ad", "--atlas", atlas, "--feature-id-column", "none")
    assert status == 1
    status, text = run("ingest", files / "counts.h5ad", "--atlas", atlas, "--codec", "zstd")
    assert status == 1
    assert "--replace" in text
    status, text = run("ingest", files / "counts.h5ad", "--atlas", atlas, "--drop-obs", "nothing")
    assert status == 1
    assert "--drop-obs" in text
    status, text = run("remove", atlas, "nothing")
    assert status == 1
    status, text = run("repack", atlas, "--codec", "nothing")
    assert status == 1
    status, text = run("info", atlas, "--version", 77)
    assert status == 1

    status, text = run("convert", files / "empty.h5ad", tmp_path / "E")
    assert status == 1
    assert "no cells" in text
    assert "was there" not in text
    status, text = run("convert", files / "no_genes.h5ad", tmp_path / "E")
    assert status == 1
    assert "no features" in text
    assert not (tmp_path / "E").exists()
    status, text = run("convert", files / "log.h5ad", archive)
    assert status == 0
    assert "--allow-normalized" in text
    status, text = run("convert", files / "counts.h5ad", archive)
    assert status == 1
    assert "--overwrite" in text
    status, text = run("convert", files / "versions.h5ad", tmp_path / "V", "--data-dtype", "uint8")
    assert status == 0
    status, text = run("convert", tmp_path / "V", atlas, "--require-shared-genes", "0.5")
    assert status == 1
    assert "--strip-versions" in text
    status, text = run("convert", tmp_path / "V", tmp_path / "B", "--union")
    assert status == 1
    assert "--union" in text

    both = tmp_path / "both"
    both.mkdir()
    for name in ("counts", "log"):
        (both / f"{name}.h5ad").write_bytes((files / f"{name}.h5ad").read_bytes())
    status, text = run("convert_h5ad_to_scdl", "--data-path", both, "--save-path", tmp_path / "C")
    assert status == 1
    assert "--allow-normalized" in text
    assert "--matrix" in text
    status, text = run("convert_h5ad_to_scdl", "--data-path", both, "--save-path", archive)
    assert status == 1
    assert "--overwrite" in text


def test_what_a_file_or_an_atlas_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of labels alone, as packages for receptors write them; an atlas of logarithms alone."""
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.errors import UnknownNameError

    anndata.AnnData(obs=data(["a"]).obs).write_h5ad(tmp_path / "labels.h5ad")
    status, text = said("ingest", [tmp_path / "labels.h5ad", "--atlas", tmp_path / "A"], capsys)
    assert status == 1
    assert "holds no matrix" in text
    data(["a", "b"], log=True).write_h5ad(tmp_path / "log.h5ad")
    into: list[object] = ["--atlas", tmp_path / "L", "--target-layer", "log_normalized"]
    assert said("ingest", [tmp_path / "log.h5ad", *into], capsys)[0] == 0
    query = RaggedAtlas.checkout_latest(tmp_path / "L").query()
    with pytest.raises(UnknownNameError, match=r"layer= of to_cell_dataset, or layers\('gene_expression'"):
        query.to_anndata()
    assert query.layers("gene_expression", ["log_normalized"]).to_anndata().n_obs == 12


def test_versions_are_dropped_on_the_way_to_an_atlas(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice of the refusal, followed."""
    from hbx_gpu.atlas import RaggedAtlas

    assert said("ingest", [files / "counts.h5ad", "--atlas", tmp_path / "A"], capsys)[0] == 0
    assert said("convert", [files / "versions.h5ad", tmp_path / "V"], capsys)[0] == 0
    _, text = said("convert", [tmp_path / "V", tmp_path / "A"], capsys)
    assert "none of its 8 features" in text
    assert "--strip-versions" in text
    atlas = RaggedAtlas.open(tmp_path / "A")
    datasets = atlas.list_datasets()
    (there,) = datasets.loc[datasets["source_name"] != "counts.h5ad", "dataset_uid"]
    assert said("remove", [tmp_path / "A", there], capsys)[0] == 0
    status, text = said(
        "convert",
        [tmp_path / "V", tmp_path / "A", "--strip-versions", "--require-shared-genes", "0.9"],
        capsys,
    )
    assert status == 0
    assert "share few genes" not in text
    query = RaggedAtlas.checkout_latest(tmp_path / "A").query()
    assert (query.count(), query.to_cell_dataset("gene_expression").n_features) == (24, 8)


def test_files_of_one_archive_that_share_few_genes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("counts", "versions"):
        (folder / f"{name}.h5ad").write_bytes((files / f"{name}.h5ad").read_bytes())
    asked: list[object] = ["--data-path", folder, "--save-path", tmp_path / "S"]
    status, text = said("convert_h5ad_to_scdl", [*asked, "--require-shared-genes", "0.5"], capsys)
    assert status == 1
    assert "none of its 8 features" in text
    assert not (tmp_path / "S").exists()
    status, text = said("convert_h5ad_to_scdl", asked, capsys)
    assert status == 0
    assert "none of its 8 features" in text


def test_bars_and_notes_keep_apart(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of the terminal belongs to a bar or to a note; a command with nothing to do shows no bar."""
    assert cli.main(["convert", str(files / "log.h5ad"), str(tmp_path / "S")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].endswith("values looked at))")
    assert "matrix X" in out
    shown = [line for part in err.split("\n") for line in part.split("\r") if line.strip()]
    assert all("warning" not in line for line in shown if "cells/s" in line or "%|" in line)
    assert cli.main(["ingest", str(files / "counts.h5ad"), "--atlas", str(tmp_path / "A")]) == 0
    capsys.readouterr()
    assert cli.main(["repack", str(tmp_path / "A"), "--codec", "hbx_gpu.rowpack"]) == 0
    assert "repack:" not in capsys.readouterr().err, "an empty bar"
