"""The real Homeobox opens what we write. Runs where HBX_HOMEOBOX_PYTHON names an interpreter that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from hbx_gpu.atlas import ImageInput, RaggedAtlas, create_or_open_atlas, repack
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


READ_MULTIMODAL = """
import json, sys
import numpy as np
from homeobox.atlas import RaggedAtlas

atlas = RaggedAtlas.checkout_latest(sys.argv[1])

def column(field, layer=None):
    dataset = atlas.query().to_unimodal_dataset(
        field, layer_overrides=layer, metadata_columns=["obs_name"]
    )
    batch = dataset.__getitems__(list(range(dataset.n_rows)))
    return batch.metadata["obs_name"].to_list(), batch

names, batch = column("protein_abundance")
found = {"protein": dict(zip(names, batch.layers["counts"].tolist()))}
names, batch = column("protein_abundance", ["dsb_normalized"])
found["dsb"] = dict(zip(names, batch.layers["dsb_normalized"].tolist()))
for field in ("image_tiles", "discrete_image"):
    names, batch = column(field)
    found[field] = {name: np.asarray(a).tolist() for name, a in zip(names, batch.layers["raw"])}
names, batch = column("gene_expression")
ends = np.append(batch.offsets, 0)
found["totals"] = {
    name: int(batch.layers["counts"][batch.offsets[i]:batch.offsets[i + 1]].sum())
    for i, name in enumerate(names)
}
names, batch = column("chromatin_accessibility")
found["starts"] = {
    name: batch.layers["starts"][batch.offsets[i]:batch.offsets[i + 1]].tolist()
    for i, name in enumerate(names)
}
print(json.dumps(found))
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

    # The values of a cell in another order are the same cell.
    repack(path, order_features=True)
    again = subprocess.run(
        [homeobox_python, "-c", READ, str(path)], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    ordered = json.loads(again.stdout.splitlines()[-1])
    for names, numbers in (("uids", "totals"), ("features", "columns"), ("batch_uids", "batch_totals")):
        # Homeobox may return cells and genes in another order in each process.
        before, after = (dict(zip(d[names], d[numbers], strict=True)) for d in (theirs, ordered))
        assert all(before.get(name, number) == number for name, number in after.items())
        assert set(before) == set(after) or names == "batch_uids"

    ours = RaggedAtlas.checkout_latest(path).query().to_anndata()
    assert theirs["features"] == ours.var_names.tolist()
    totals = dict(zip(ours.obs_names, np.asarray(ours.X.sum(1)).ravel().tolist(), strict=True))
    assert dict(zip(theirs["uids"], theirs["totals"], strict=True)) == totals
    assert theirs["columns"] == np.asarray(ours.X.sum(0)).ravel().tolist()
    assert len(theirs["batch_uids"]) > 100
    for uid, total in zip(theirs["batch_uids"], theirs["batch_totals"], strict=True):
        assert total == totals[uid]


def test_real_homeobox_reads_several_modalities(homeobox_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [f"c{i}" for i in range(40)]
    genes = pd.DataFrame(index=[f"g{i}" for i in range(12)])
    rna = anndata.AnnData(rng.integers(0, 4, (40, 12)).astype("f4"), obs=pd.DataFrame(index=ids), var=genes)
    counts = rng.integers(0, 99, (30, 5)).astype("f4")
    proteins = pd.DataFrame(index=[f"p{i}" for i in range(5)])
    protein = anndata.AnnData(counts, obs=pd.DataFrame(index=ids[10:]), var=proteins)
    protein.layers["dsb"] = counts / 4
    tiles, image = (
        rng.integers(0, 255, (6, 2, 4, 5)).astype("u1"),
        rng.integers(0, 999, (2, 60, 70)).astype("u2"),
    )
    boxes = {"cell_id": ids[3:5], "y0": [0, 50], "y1": [2, 60], "x0": [7, 0], "x1": [9, 70]}
    lines = [f"chr{rng.integers(1, 4)}\t{i * 7}\t{i * 7 + 5}\t{ids[i % 3]}\n" for i in range(50)]
    (tmp_path / "f.tsv").write_text("".join(lines))
    atlas = create_or_open_atlas(tmp_path / "a", codec="homeobox.bitpacking")
    atlas.add_multimodal(
        {
            "rna": rna,
            "protein": protein,
            "tiles": ImageInput(tiles, {"cell_id": ids[:3], "tile": [5, 0, 5]}),
            "images": ImageInput(image, boxes),
            "atac": tmp_path / "f.tsv",
        },
        layers={"protein": {"counts": "X", "dsb_normalized": "dsb"}},
    )
    atlas.optimize()
    atlas.snapshot()
    done = subprocess.run(
        [homeobox_python, "-c", READ_MULTIMODAL, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["protein"] == dict(zip(ids[10:], counts.tolist(), strict=True))
    assert theirs["dsb"] == dict(zip(ids[10:], (counts / 4).tolist(), strict=True))
    assert theirs["image_tiles"] == {ids[i]: tiles[j].tolist() for i, j in enumerate((5, 0, 5))}
    assert theirs["discrete_image"] == {
        ids[3]: image[:, 0:2, 7:9].tolist(),
        ids[4]: image[:, 50:60, 0:70].tolist(),
    }
    assert theirs["totals"] == dict(zip(ids, rna.X.sum(1).astype(int).tolist(), strict=True))
    assert {name: len(starts) for name, starts in theirs["starts"].items()} == {"c0": 17, "c1": 17, "c2": 16}
    for name, starts in theirs["starts"].items():
        mine = [int(line.split("\t")[1]) for line in lines if line.strip().endswith(name)]
        assert sorted(starts) == mine
