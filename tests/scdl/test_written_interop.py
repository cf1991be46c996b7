"""The real package opens what we write. Runs where HBX_SCDL_PYTHON names an interpreter that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu.scdl.archive import open_archive
from hbx_gpu.scdl.cast import cast_archive
from hbx_gpu.scdl.command import main
from hbx_gpu.scdl.concat import concat_archives
from hbx_gpu.scdl.convert import ConvertOptions, convert_h5ad
from hbx_gpu.scdl.values import DATA_DTYPES
from tests.scdl.files import adata, content, counts

READ = """
import json, sys, warnings
import numpy as np
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

warnings.simplefilter("error")
found = []
for path in sys.argv[1:]:
    data = SingleCellMemMapDataset(path, load_neighbors=True)
    rows = []
    for i in range(len(data)):
        (values, columns), var, obs = data.get_row(i, return_var_features=True, return_obs_features=True)
        rows.append({
            "values": np.asarray(values).tolist(),
            "columns": np.asarray(columns).tolist(),
            "genes": [np.asarray(column).tolist() for column in var],
            "cell": [None if x is None or x != x else getattr(x, "item", lambda: x)() for x in obs],
            "item": data[i].tolist(),
            "near": data.get_neighbor_indices_for_cell(i).tolist(),
            "weights": data.get_neighbor_weights_for_cell(i).tolist(),
        })
    stored = int(data.number_nonzero_values())
    found.append({"rows": rows, "shape": data.shape(), "dtypes": data.dtypes, "stored": stored})
print(json.dumps(found))
"""

JOIN = """
import sys
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

one, two = (SingleCellMemMapDataset(path) for path in sys.argv[1:3])
one.concat([two], output_path=sys.argv[3])
"""


@pytest.fixture
def scdl_python() -> str:
    python = os.environ.get("HBX_SCDL_PYTHON")
    if not python:
        pytest.skip("HBX_SCDL_PYTHON names no interpreter with bionemo-scdl 0.1.3")
    return python


def run(python: str, program: str, *args: Path) -> str:
    done = subprocess.run(
        [python, "-c", program, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def real(python: str, *paths: Path) -> list[dict[str, Any]]:
    return json.loads(run(python, READ, *paths).splitlines()[-1])


def assert_same(theirs: dict[str, Any], path: Path) -> None:
    ours, archive = content(path), open_archive(path)
    assert archive.obs is not None
    assert theirs["shape"] == [archive.n_rows, archive.n_vars]
    assert theirs["stored"] == archive.nnz
    stored = [theirs["dtypes"][f"{name}.npy"] for name in ("data", "col_ptr", "row_ptr")]
    assert stored == ours["dtypes"]
    for i, row in enumerate(theirs["rows"]):
        assert (row["values"], row["columns"]) == ours["rows"][i]
        assert row["item"] == [row["values"], row["columns"]]
        assert row["genes"] == [list(c) for c in ours["var"][int(archive.block_of(i))].values()]
        values, _ = archive.obs.lookup(i)
        assert row["cell"] == [None if v is None or v != v else v for v in values]
        if ours["neighbors"] is not None:
            assert (row["near"], row["weights"]) == ours["neighbors"][i]


def test_the_real_package_reads_what_we_write(scdl_python: str, tmp_path: Path) -> None:
    folder = tmp_path / "h5ad"
    folder.mkdir()
    # More than nine gene blocks, the first two the same; categories, missing values; neighbours.
    for i in range(12):
        x = counts(3 + i % 2, 250 + max(i, 1), seed=i, high=60000)
        data = adata({0: x, 1: x.tocsc(), 2: x.toarray()}[i % 3], genes=f"{max(i, 1)}_", cells=f"{i}_")
        data.obs.loc[data.obs.index[0], "kind"] = None
        data.obsp["next_cell_ids"] = sp.random(
            *[x.shape[0]] * 2, 0.5, "csr", random_state=i, dtype=np.float32
        )
        data.write_h5ad(folder / f"{i:02d}.h5ad")
    paths = [tmp_path / name for name in ("all", "joined", *DATA_DTYPES[1:])]
    arguments = ["--data-path", folder, "--save-path", paths[0], "--data-dtype", "auto", "--load-neighbors"]
    assert main([str(a) for a in arguments]) == 0
    concat_archives([paths[0], paths[0]], paths[1])
    for dtype in DATA_DTYPES[1:]:
        options = ConvertOptions(neighbor_key="next_cell_ids")
        convert_h5ad(folder / "04.h5ad", tmp_path / dtype, options=options)
        if dtype == "float16":
            continue
        cast_archive(tmp_path / dtype, dtype)
    for path, theirs in zip(paths, real(scdl_python, *paths), strict=True):
        assert_same(theirs, path)
    assert open_archive(paths[0]).data.dtype == np.uint16
    assert len(open_archive(paths[0]).n_vars) == 11


def test_nothing_stored(scdl_python: str, tmp_path: Path) -> None:
    data = adata(sp.csr_matrix((4, 3), dtype="f4"))
    data.obsp["next_cell_ids"] = sp.csr_matrix((4, 4), dtype="f4")
    data.write_h5ad(tmp_path / "x.h5ad")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a", options=ConvertOptions(neighbor_key="next_cell_ids"))
    (theirs,) = real(scdl_python, tmp_path / "a")
    # It counts the one element of padding as stored, but no row has it.
    assert [row["values"] for row in theirs["rows"]] == [[]] * 4
    assert [row["near"] for row in theirs["rows"]] == [[]] * 4


def test_the_real_package_joins_what_we_write(scdl_python: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        # Of the same genes: it cannot join reopened archives of different ones.
        adata(counts(4, 3, seed=ord(name[0]))).write_h5ad(tmp_path / f"{name}.h5ad")
        convert_h5ad(tmp_path / f"{name}.h5ad", tmp_path / name)
    parts = [content(tmp_path / name) for name in ("one", "two")]
    run(scdl_python, JOIN, tmp_path / "one", tmp_path / "two", tmp_path / "joined")
    joined = content(tmp_path / "joined")
    assert joined["rows"] == parts[0]["rows"] + parts[1]["rows"]
    # Names of cells that it did not carry along are unknown, not shifted.
    assert joined["cells"] is None
    assert joined["genes"][0] == parts[0]["genes"][0]
