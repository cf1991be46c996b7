"""The command `convert_h5ad_to_scdl`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu import cli
from hbx_gpu._commands.convert_h5ad_to_scdl import main
from hbx_gpu.scdl._format.archive import open_archive
from tests.scdl.files import adata, content, counts, h5ad, leftovers, matrix


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "h5ad"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("b", "a", "deep/c")):
        data = adata(counts(3 + i, 4, seed=i), genes=name, cells=name)
        data.raw = adata(counts(3 + i, 6, seed=i + 10), genes=f"raw{name}")
        data.obsp["near"] = sp.random(3 + i, 3 + i, 0.5, "csr", random_state=i, dtype=np.float32)
        data.write_h5ad(folder / f"{name}.h5ad")
    return folder


def run(*args: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        return main([str(a) for a in args])


def test_a_folder(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "missing" / "parents" / "a"
    assert run("--data-path", sources, "--save-path", target) == 0
    found = content(target)
    assert found["labels"] == [str(sources / f"{name}.h5ad") for name in ("a", "b", "deep/c")]
    assert found["bounds"] == [0, 4, 7, 12]
    assert [len(frame["feature_id"]) for frame in found["var"]] == [6, 6, 6]
    assert "12 cells from 3 file(s)" in capsys.readouterr().out


def test_one_file(sources: Path, tmp_path: Path) -> None:
    assert run("--data-path", sources / "b.h5ad", "--save-path", tmp_path / "a", "--use-X-not-raw") == 0
    assert (matrix(tmp_path / "a") != counts(3, 4, seed=0)).nnz == 0


@pytest.mark.slow
def test_processes_give_the_same_archive(sources: Path, tmp_path: Path) -> None:
    options = ["--data-dtype", "auto", "--load-neighbors", "--neighbor-key", "near"]
    assert run("--data-path", sources, "--save-path", tmp_path / "a", *options) == 0
    assert (
        run("--data-path", sources, "--save-path", tmp_path / "b", *options, "--use-mp", "--num-workers", 2)
        == 0
    )
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["dtypes"][0] == "uint8"
    assert not leftovers(tmp_path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Dask leaves sockets to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dask_cluster_and_convert_give_the_same_archive(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    assert run("--data-path", sources, "--save-path", tmp_path / "a", "--matrix", "X") == 0
    assert cli.main(["convert", str(sources), str(tmp_path / "c"), "--layer", "X"]) == 0
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        dask = ["--dask", cluster.scheduler_address]
        assert run("--data-path", sources, "--save-path", tmp_path / "b", "--matrix", "X", *dask) == 0
        assert cli.main(["convert", str(sources), str(tmp_path / "d"), "--layer", "X", *dask]) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "c") == content(tmp_path / "d")
    assert content(tmp_path / "c")["dtypes"][0] == "uint8"
    assert not leftovers(tmp_path)
    capsys.readouterr()
    one = ["convert", str(sources / "a.h5ad"), str(tmp_path / "e"), "--workers", "2"]
    assert cli.main(one) == 1
    assert "is a file of cells: --workers cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["-", "_"])
def test_every_documented_flag_in_both_spellings(sources: Path, tmp_path: Path, style: str) -> None:
    flags = {
        "data-path": sources,
        "save-path": tmp_path / "a",
        "num-workers": 2,
        "data-dtype": "float64",
        "paginated-load-cutoff": "10_000",
        "load-block-row-size": "1_000_000",
        "use-X-not-raw": None,
    }
    args = [part for name, value in flags.items() for part in (f"--{name.replace('-', style)}", value)]
    assert run(*(part for part in args if part is not None)) == 0
    archive = open_archive(tmp_path / "a")
    assert archive.data.dtype == np.float64
    assert archive.n_vars == [4, 4, 4]


def test_our_own_flags(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data-path", sources, "--save-path", tmp_path / "a"]
    assert run(*base, "--matrix", "X", "--load_neighbors", "--neighbor_key", "near") == 0
    table = open_archive(tmp_path / "a").neighbors
    assert table is not None
    assert len(table.indices)
    h5ad(sources / "b.h5ad", counts(3, 6) * 0.5)
    assert run(*base, "--data-dtype", "uint8", "--overwrite", "--use-X-not-raw") == 1
    assert "--allow-normalized" in capsys.readouterr().err
    base.append("--allow-normalized")
    assert run(*base, "--data-dtype", "uint8", "--overwrite", "--use-X-not-raw") == 1
    assert "--allow-loss" in capsys.readouterr().err
    assert open_archive(tmp_path / "a").neighbors is not None
    assert run(*base, "--data-dtype", "uint8", "--overwrite", "--use-X-not-raw", "--allow-loss") == 0
    assert "warning: Downcasted data values" in capsys.readouterr().err
    assert open_archive(tmp_path / "a").neighbors is None


def test_an_existing_target_is_refused(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--data-path", sources / "a.h5ad", "--save-path", tmp_path / "a"]
    assert run(*args) == 0
    before = content(tmp_path / "a")
    assert run("--data-path", sources / "b.h5ad", "--save-path", tmp_path / "a") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert content(tmp_path / "a") == before
    assert run("--data-path", sources / "b.h5ad", "--save-path", tmp_path / "a", "--overwrite") == 0
    assert content(tmp_path / "a") != before


def test_exit_codes(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run("--data-path", tmp_path / "empty", "--save-path", tmp_path / "a") == 1
    assert "There a no h5ad files" in capsys.readouterr().err
    assert run("--data-path", sources, "--save-path", tmp_path / "a", "--data-dtype", "int8") == 1
    assert "Invalid data_dtype" in capsys.readouterr().err
    for bad in (["--data-path", "x"], ["--data-path", "x", "--save-path", "y", "--nope"]):
        with pytest.raises(SystemExit) as left:
            run(*bad)
        assert left.value.code == 2
    assert not (tmp_path / "a").exists()


def test_an_interrupt_leaves_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hbx_gpu.scdl._writing.convert._write_rows", interrupt)
    assert run("--data-path", sources, "--save-path", tmp_path / "a") == 130
    assert "as it was" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["h5ad"]


def test_files_without_raw_are_named_and_the_matrix_of_counts_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "h5ad"
    folder.mkdir()
    raw = counts(20, 30, seed=1)
    adata(raw, cells="a").write_h5ad(folder / "a.h5ad")
    normalized = raw.toarray() / np.maximum(raw.sum(1), 1) * 1e4
    logs = adata(sp.csr_matrix(np.log1p(normalized).astype(np.float32)), cells="b")
    logs.layers["counts"] = raw
    logs.write_h5ad(folder / "b.h5ad")
    options = ["--data-path", folder, "--save-path"]
    assert run(*options, tmp_path / "refused") == 1
    said = capsys.readouterr().err
    assert "a.h5ad and 1 more do not have raw count data (raw.X), so X is taken" in said
    assert "--use-X-not-raw says that X is meant" in said
    assert "a.h5ad holds counts in X" in said
    assert "b.h5ad holds log-normalized values" in said
    assert "with --matrix auto" in said
    assert not leftovers(tmp_path)
    assert not (tmp_path / "refused").exists()
    assert run(*options, tmp_path / "auto", "--matrix", "auto") == 0
    assert (matrix(tmp_path / "auto") != sp.vstack([raw, raw])).nnz == 0
    assert "raw count data" not in capsys.readouterr().err
    assert run("--data-path", folder / "a.h5ad", "--save-path", tmp_path / "x", "--use-X-not-raw") == 0
    assert "warning" not in capsys.readouterr().err
