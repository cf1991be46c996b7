"""The real Homeobox opens what we write. Runs where HBX_HOMEOBOX_PYTHON names an interpreter that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main

READ = """
import json, sys
import numpy as np
from homeobox.atlas import RaggedAtlas

atlas = RaggedAtlas.checkout_latest(sys.argv[1])
whole = atlas.query().to_anndata()
dataset = atlas.query().to_unimodal_dataset("gene_expression", metadata_columns=["uid"])
batch = dataset.__getitems__(list(range(0, dataset.n_rows, 97)))
print(json.dumps({
    "uids": whole.obs_names.tolist(),
    "features": whole.var_names.tolist(),
    "totals": np.asarray(whole.X.sum(1)).ravel().tolist(),
    "columns": np.asarray(whole.X.sum(0)).ravel().tolist(),
    "batch_uids": batch.metadata["uid"].to_list(),
    "batch_totals": np.add.reduceat(
        np.append(batch.layers["counts"], 0), batch.offsets[:-1]
    ).tolist(),
}))
"""


@pytest.fixture
def homeobox_python() -> str:
    python = os.environ.get("HBX_HOMEOBOX_PYTHON")
    if not python:
        pytest.skip("HBX_HOMEOBOX_PYTHON names no interpreter with homeobox >= 0.2.9")
    return python


def test_real_homeobox_reads_our_atlas(
    homeobox_python: str, real_h5ad: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "atlas"
    files = [str(f) for f in real_h5ad]
    assert main(["ingest", *files, "--atlas", str(path), "--codec", "homeobox.bitpacking"]) == 0
    done = subprocess.run(
        [homeobox_python, "-c", READ, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])

    ours = RaggedAtlas.checkout_latest(path).query().to_anndata()
    assert theirs["features"] == ours.var_names.tolist()
    totals = dict(zip(ours.obs_names, np.asarray(ours.X.sum(1)).ravel().tolist(), strict=True))
    assert dict(zip(theirs["uids"], theirs["totals"], strict=True)) == totals
    assert theirs["columns"] == np.asarray(ours.X.sum(0)).ravel().tolist()
    assert len(theirs["batch_uids"]) > 100
    for uid, total in zip(theirs["batch_uids"], theirs["batch_totals"], strict=True):
        assert total == totals[uid]
