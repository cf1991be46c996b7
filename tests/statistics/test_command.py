"""`hbx-gpu stats`: summaries, files, and errors in the words of the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hbx_gpu._commands import executors
from hbx_gpu.cli import main
from hbx_gpu.statistics import Statistics
from hbx_gpu.testing import example_atlas


def test_an_atlas_by_a_column_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = example_atlas(tmp_path / "atlas")
    found = atlas.statistics("donor", keep=False)
    root = str(tmp_path / "atlas")
    for name in ("a.parquet", "a.csv", "a.npz"):
        assert main(["stats", root, "--by", "donor", "--out", str(tmp_path / name), "--threads", "2"]) == 0
    expected = found.to_pandas().reset_index()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), expected)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), expected)
    assert Statistics.load(tmp_path / "a.npz").groups["d1"].n_cells == 60
    out = capsys.readouterr().out
    assert "120 cells in 2 groups by 'donor', 45 features" in out
    assert "medians (exact)" in out
    assert len(list((tmp_path / "atlas" / "statistics").iterdir())) == 1


@pytest.mark.slow
def test_processes_compute_the_same(tmp_path: Path) -> None:
    example_atlas(tmp_path / "atlas")
    for name, where in (("a.csv", []), ("b.csv", ["--workers", "2"])):
        shutil.rmtree(tmp_path / "atlas" / "statistics", ignore_errors=True)  # what an atlas keeps
        assert main(["stats", str(tmp_path / "atlas"), "--out", str(tmp_path / name), *where]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_filter_and_variable_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = example_atlas(tmp_path / "atlas")
    command = ["stats", str(tmp_path / "atlas"), "--where", "donor = 'd0'", "--hvg", "5"]
    assert main([*command, "--out", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    chosen = {row["feature_uid"] for row in rows if row["highly_variable"]}
    wanted = atlas.query().where("donor = 'd0'").statistics().highly_variable(5)
    assert chosen == set(wanted.index)
    assert f"the first of them: {wanted.index[0]}" in capsys.readouterr().out
    command = ["stats", str(tmp_path / "atlas"), "--hvg", "5", "--batch-key", "donor"]
    assert main([*command, "--out", str(tmp_path / "b.csv")]) == 0
    batches = atlas.statistics("donor").highly_variable(5, batch_key="donor")
    table = pd.read_csv(tmp_path / "b.csv").set_index("feature_uid")
    assert set(table.index[table["highly_variable"]]) == set(batches.index)
    np.testing.assert_allclose(table.loc[batches.index, "variances_norm"], batches["variances_norm"])


def test_a_store_in_place(real_h5ad: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(real_h5ad[1])]) == 0
    assert "1,107 cells, 507 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "cell_type"], "cell_type"),
        (["--layer", "spliced"], "--layer"),
        (["--batch-key", "donor"], "--batch-key is for --hvg N"),
        (["--hvg", "3", "--out", "a.npz"], "leave --hvg out"),
        (["--where", "organ ="], "organ ="),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--threads", "2", "--workers", "2"], "--threads is for this process"),
        (["--dask", "tcp://127.0.0.1:1"], "no Dask scheduler answers there"),
    ],
)
def test_errors_name_the_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(executors, "_DASK_SECONDS", 0.5)
    example_atlas(tmp_path)
    if "--dask" in arguments:
        pytest.importorskip("distributed")
    assert main(["stats", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--out", "a.xlsx"], ["--out", "missing/a.csv"], ["--hvg", "0"], ["--workers", "x"]]
)
def test_arguments_that_cannot_be_meant(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["stats", str(tmp_path), *arguments])
