"""The benchmarks run, measure what they say, and write what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, device, throughput
from benchmarks.jobs import in_process
from benchmarks.stages import planning
from benchmarks.startup import workers
from hbx_gpu._bench import tables

SMALL = ("--cells", "600", "--genes", "300")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
def test_throughput_measures_in_processes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--batch-sizes", "50", "--repeat", "2", "--seconds", "0.05", "--outputs", "dense"]
    arguments += ["--orders", "group", "--readers", "hbx_gpu loader", "AnnData backed", "AnnData in memory"]
    assert throughput.main([*arguments, "--data", str(data), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "throughput.json").read_text())
    # Data in memory are measured in random order only.
    assert [r["reader"] for r in found["results"]] == ["hbx_gpu loader", "AnnData backed"]
    for result in found["results"]:
        rate = result["cells_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert len(result["runs"]) == 2
        # At least a Python interpreter with NumPy and torch, at most this small data's worth more.
        assert 50e6 < result["peak_rss"]["median"] < 3e9
    assert min(found["data"]["bytes"].values()) > 0
    out = capsys.readouterr().out
    assert "AnnData backed" in out
    assert "page cache warm" in out
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_run_covers_every_output_order_and_batch_size() -> None:
    options = throughput._parse([])
    found = throughput.jobs(options, common.Prepared(Path("atlas"), Path("whole.h5ad")))
    for reader in ("hbx_gpu loader", "AnnData backed"):
        mine = {(job.output, job.order, job.batch) for job in found if job.reader == reader}
        assert len(mine) == 2 * 2 * 3


def test_both_sides_read_the_same_cells(data: Path) -> None:
    """The atlas and the .h5ad of the baseline hold the same rows in the same order."""
    import anndata
    import numpy as np
    from scipy import sparse

    from hbx_gpu.atlas import RaggedAtlas

    prepared = common.prepare(data, common.DataSpec(cells=600, genes=300))
    expected = anndata.read_h5ad(prepared.h5ad).X
    dataset = RaggedAtlas.checkout_latest(str(prepared.atlas)).query().to_cell_dataset("gene_expression")
    assert expected.shape == (dataset.n_cells, dataset.n_features) == (600, 300)
    assert len(np.unique(dataset.groups_np)) == 4
    batch: Any = dataset[np.arange(600)]
    found = sparse.csr_matrix((batch.values, batch.indices, batch.offsets), (600, 300))
    assert (found != expected).nnz == 0


@pytest.mark.parametrize("reader", [*throughput.DEFAULT_READERS, "hbx_gpu map"])
def test_an_epoch_is_all_cells(reader: str, data: Path) -> None:
    prepared = common.prepare(data, common.DataSpec(cells=600, genes=300))
    job = throughput.Job(
        reader,
        "dense",
        "none",
        70,
        str(prepared.atlas),
        str(prepared.h5ad),
        groups=4,
        seconds=0.0,
        cache="warm",
    )
    sizes = list(throughput.READERS[reader](job)(0))
    assert sum(sizes) == 600
    assert max(sizes) == 70


def test_results_are_sorted_by_rate_within_a_block() -> None:
    def result(reader: str, rate: float) -> dict[str, object]:
        one = {"median": rate, "min": rate, "max": rate}
        return {"reader": reader, "output": "csr", "order": "none", "batch": 64, "cells_per_s": one,
                "peak_rss": {"median": 2e8}, "open_s": {"median": 0.5}}  # fmt: skip

    lines = throughput.report([result("slow", 10.0), result("fast", 20_000.0)]).splitlines()
    assert [line.split()[0] for line in lines] == ["reader", "fast", "slow"]
    assert "20,000 .. 20,000" in lines[1]


def test_markdown_has_a_row_per_reader() -> None:
    def result(reader: str, order: str, rate: float) -> dict[str, object]:
        return {"reader": reader, "output": "csr", "order": order, "batch": 64,
                "cells_per_s": {"median": rate}, "peak_rss": {"median": rate * 1e6}}  # fmt: skip

    found = [result("AnnData backed", "none", 5), result("AnnData backed", "group", 7000)]
    lines = throughput.markdown(found, 64).splitlines()
    assert lines[2] == "| AnnData backed | 5 | 7,000 | – | – | 5 – 7,000 MB |"
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_a_failing_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'nonsense'"):
        in_process("benchmarks.throughput:run", {"nonsense": 1})


def test_planning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--groups", "3", "200", "--batch-sizes", "64", "--rows", "5000", "--repeat", "3"]
    assert planning.main([*arguments, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "planning.json").read_text())["results"]
    assert [r["groups"] for r in results] == [3, 200]
    assert all(r["ms_per_1000_rows"]["min"] > 0 for r in results)
    assert "ms per 1,000 rows" in capsys.readouterr().out


def test_planned_rows_fill_their_groups() -> None:
    """The made-up row index is one that a real atlas could have."""
    tables, rows = planning.made_up_atlas(7, 1_000, per_row=90)
    for group in range(7):
        mine = rows.source == group
        start, length = rows.start[mine], rows.length[mine]
        assert start[0] == 0
        assert (start[1:] == (start + length)[:-1]).all()
    assert len(tables.chunk_base) == 7 * 2 + 1


@pytest.mark.slow
def test_workers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workers.main([*SMALL, "--repeat", "1", "--data", str(data), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "workers.json").read_text())
    assert found["rows"] == 600
    assert found["bare"][0]["rows"] == 512
    assert 0 < found["bare"][0]["ready_s"] <= found["bare"][0]["first_batch_s"]
    assert found["pickled_bytes"] > 0
    assert "DataLoader worker" in capsys.readouterr().out


def test_table_aligns() -> None:
    assert tables.table(("a", "bb"), [("ccc", "1"), ("d", "22")]) == "a    bb\nccc   1\nd    22"


def test_device_measures_epochs_and_compares_values(tmp_path: Path) -> None:
    from hbx_gpu.testing import example_dataset, example_groups
    from tests.emulation.backend import EmulatedBackend

    dataset = example_dataset(tmp_path, example_groups())
    backend = EmulatedBackend()
    assert device.differences(dataset, backend, 16) == 0
    assert 0 < device.staged_bytes(dataset, backend, 16) < 1 << 20
    for setting in device.SETTINGS[:2]:
        for where in (backend, None):
            with device.loader_for(dataset, where, setting, 16) as loader:
                assert device.epoch_rate(loader, 0, lambda: None) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device_without_a_gpu_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main([]) == 2
    assert "asked for" in capsys.readouterr().out
