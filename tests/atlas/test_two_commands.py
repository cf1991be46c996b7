"""Two ingest commands at once, each with its own process group, that share nothing but a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._catalog import tables
from tests import fresh
from tests.atlas.test_ingest_crash import make
from tests.emulation.build import outer_environment

CELLS = 10
# Both are told to begin once both have imported everything, so that they meet.
PROGRAM = """
import sys
import hbx_gpu.atlas
from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._catalog import tables
print("ready", flush=True)
sys.stdin.readline()
sys.exit(cli.main(sys.argv[1:]))
"""


def begin(root: Path, files: list[Path]) -> subprocess.Popen[str]:
    return fresh.popen(
        [sys.executable, "-c", PROGRAM, "ingest", *map(str, files), "--atlas", str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outer_environment(),
        start_new_session=True,
    )


def check_whole(root: Path) -> int:
    """Every dataset is whole and there once, and nothing else lies about. Returns their number."""
    catalog = RaggedAtlas.open(root).catalog
    rows = catalog.dataset_rows()
    cells = tables.read(catalog.obs("cells"), ["dataset_uid", "obs_name"]).to_pylist()
    assert len(cells) == len({cell["obs_name"] for cell in cells}) == CELLS * len(rows)
    assert {cell["dataset_uid"] for cell in cells} == {row["dataset_uid"] for row in rows}
    store = root / "zarr_store"
    groups = {str(path.parent.parent.relative_to(store)) for path in store.rglob("csr/zarr.json")}
    assert groups == {row["zarr_group"] for row in rows}
    assert not list((root / ".hbx_gpu").glob("*.json"))
    assert not (store / ".staging").exists()
    return len(rows)


@pytest.mark.slow  # two interpreters that import everything
def test_one_adds_and_the_other_waits_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They also make the atlas, and have two files in common."""
    files = [tmp_path / f"{i}.h5ad" for i in range(4)]
    for i, path in enumerate(files):
        make(CELLS, ["a", "b", f"g{i}"], i).write_h5ad(path)
    root = tmp_path / "atlas"
    commands = [files[:3], files[1:]]
    processes = [begin(root, given) for given in commands]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    assert 0 in codes, ended
    for code, (out, err) in zip(codes, ended, strict=True):
        assert code == 0 or "another writer holds the atlas" in err, (out, err)
        assert "Traceback" not in err
    assert check_whole(root) == (3 if 1 in codes else 4)
    # Run again, the one that was refused goes on with what is missing, and the other has nothing to do.
    for given in commands:
        assert cli.main(["ingest", *map(str, given), "--atlas", str(root)]) == 0
    assert check_whole(root) == 4
    assert capsys.readouterr().out.count("already ingested, skipped") >= 5
