"""The demo end to end on small data, on real files, and again on the same files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu import demo
from hbx_gpu.synthetic import write_h5ad


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert demo.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def number(text: str, pattern: str) -> float:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} not in:\n{text}"
    return float(match[1].replace(",", ""))


def test_synthetic_demo_learns_cell_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--out", tmp_path, "--cells", 3_000, "--genes", 300, "--batch-size", 64)
    assert "predict 'cell_type' (8 categories)" in out
    assert number(out, r"cross-entropy: ([\d.]+) in the first batch") > 1.5
    assert number(out, r"([\d.]+) over the last 10\n") < 1.0
    assert number(out, r"last 10 batches: ([\d.]+)%") > 1.5 * number(out, r"largest class: ([\d.]+)%")
    assert number(out, r"([\d,]+) cells in") == 3_000
    assert number(out, r"; ([\d,]+) cells/s in the second half") > 0
    assert 0 <= number(out, r"waited for data ([\d.]+)%") <= 100
    picture = (tmp_path / "throughput.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_second_run_ingests_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--out", tmp_path, "--cells", 500, "--genes", 100)
    run(capsys, *arguments)

    def groups() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in tmp_path.glob("*/zarr_store/**/*") if path.is_file()
        }

    before = groups()
    assert before
    assert number(run(capsys, *arguments), r"([\d,]+) cells in") == 500
    assert groups() == before


def test_real_files(tmp_path: Path, real_h5ad: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Neither file has an obs column: the demo trains an autoencoder on both, and says so."""
    out = run(capsys, *real_h5ad, "--out", tmp_path)
    assert "autoencoder" in out
    assert number(out, r"([\d,]+) cells in") == 10_000 + 1_107
    assert number(out, r"error: ([\d.]+) in the first") > number(out, r"([\d.]+) over the last 10\n")


def test_label_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", 300, 50)
    assert "predict 'donor' (6 categories)" in run(capsys, path, "--out", tmp_path, "--label", "donor")
    with pytest.raises(SystemExit, match=r"--label n_counts.*'cell_type', 'donor'"):
        demo.main([str(path), "--out", str(tmp_path), "--label", "n_counts"])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"donor": 6, "cell_type": 8}, "cell_type"),
        ({"donor": 6, "Leiden_res1": 8}, "Leiden_res1"),
        ({"leiden": 3, "celltype_major": 8}, "celltype_major"),
        ({"barcode": 201, "sex": 2}, "sex"),
        ({"cell_type": 1, "sex": 2}, "sex"),
        ({"barcode": 900, "assay": 1}, None),
        ({}, None),
    ],
)
def test_choice_of_label(sizes: dict[str, int], expected: str | None) -> None:
    assert demo.choose_label({name: np.arange(n) for name, n in sizes.items()}) == expected


def test_atlas_belongs_to_its_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    a.write_text("one")
    b.write_text("two")
    both = demo.atlas_for([a, b], tmp_path, own=True)
    assert demo.atlas_for([a, b], tmp_path, own=True) == both
    assert demo.atlas_for([a], tmp_path, own=True) != both
    os.utime(a, ns=(1, 1))
    assert demo.atlas_for([a, b], tmp_path, own=True) != both


def test_share_of_waiting_is_of_the_whole() -> None:
    trace = demo.Trace("task", "loss", cells=[10, 10], waited=[1.0, 0.0], trained=[1.0, 2.0], loss=[2.0, 1.0])
    assert trace.rate == 5
    assert trace.wait_share == 0.25
    assert "20 cells in 4.0 s, the first batch after 2.0 s; 5 cells/s in the second half" in trace.report()
    assert "The model waited for data 25.0% of the time" in trace.report()


def test_the_steady_rate_leaves_the_beginning_out() -> None:
    slow = demo.Trace("task", "loss", cells=[10] * 4, waited=[0.0] * 4, trained=[7.0, 1.0, 5.0, 5.0])
    assert slow.steady_rate == 20 / 10
    once = demo.Trace("task", "loss", cells=[10], waited=[0.0], trained=[2.0])
    assert once.steady_rate == once.rate == 5
