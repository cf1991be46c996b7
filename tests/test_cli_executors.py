"""``--workers`` and ``--dask``: the same result from other processes, and one where there is little to do."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hbx_gpu import cli
from hbx_gpu._commands.executors import chosen_executor
from hbx_gpu.atlas import RaggedAtlas
from tests.atlas.test_ingest_crash import make

# Dask leaves sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.h5ad" for i in range(3)]
    for i, path in enumerate(paths):
        make(6, list("abc"), i).write_h5ad(path)
    return paths


def ingest(tmp_path: Path, files: list[Path], *options: str) -> int:
    return cli.main(["ingest", *map(str, files), "--atlas", str(tmp_path / "a"), *options])


def test_the_workers_of_a_dask_cluster(
    tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        assert ingest(tmp_path, files, "--dask", cluster.scheduler_address) == 0
    assert [f"{path}: 6 cells added" in capsys.readouterr().out for path in files[:1]] == [True]
    assert RaggedAtlas.checkout_latest(tmp_path / "a").query().count() == 18


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path: Path, files: list[Path]) -> None:
    assert ingest(tmp_path, files, "--workers", "2") == 0
    assert RaggedAtlas.checkout_latest(tmp_path / "a").query().count() == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "argument --workers: expected a whole number of at least 1, got '0'"),
        (["--workers", "2", "--dask", "tcp://h:1"], "--dask: not allowed with argument --workers"),
    ],
)
def test_options_that_are_wrong(
    tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        ingest(tmp_path, files, *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "n_tasks", "n_bytes"), [(None, 3, 3000), (1, 500, 1 << 40), (8, 1, 1 << 40)]
)
def test_little_work_starts_no_process(workers: int | None, n_tasks: int, n_bytes: int) -> None:
    with chosen_executor(argparse.Namespace(workers=workers, dask=None), n_tasks, n_bytes) as executor:
        assert executor is None


def test_a_folder_stands_for_its_files(
    tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "more"
    (folder / "deep").mkdir(parents=True)
    for i, path in enumerate(files):
        path.rename(folder / ("deep" if i == 1 else ".") / path.name)
    (folder / "notes.txt").touch()
    assert ingest(tmp_path, [folder]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" s")]
    assert [line.partition(":")[0] for line in lines] == [
        str(folder / name) for name in ("0.h5ad", "2.h5ad", "deep/1.h5ad")
    ]
    (tmp_path / "empty").mkdir()
    assert ingest(tmp_path, [tmp_path / "empty"]) == 1
    assert "expected an .h5ad file" in capsys.readouterr().err
