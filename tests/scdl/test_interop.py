"""The real bionemo-scdl opens what we write, and we read what it reads.

Runs where HBX_SCDL_PYTHON names an interpreter that has bionemo-scdl 0.1.3.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu.scdl import SingleCellMemMapDataset, collate_sparse_matrix_batch
from hbx_gpu.scdl.cast import cast_archive
from hbx_gpu.scdl.concat import concat_archives
from hbx_gpu.scdl.convert import ConvertOptions, convert_h5ad
from hbx_gpu.scdl.exchange import archive_to_atlas
from hbx_gpu.scdl.export import atlas_to_archive
from tests.scdl import files
from tests.scdl.conftest import Case

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        not os.environ.get("HBX_SCDL_PYTHON"),
        reason="HBX_SCDL_PYTHON names no interpreter with bionemo-scdl 0.1.3",
    ),
]

# What the package tells of an archive; floats as text, so that NaN and None compare.
READ = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

def plain(value):
    return "None" if value is None or value != value else str(value)

found = []
for path, neighbors in json.loads(sys.argv[1]):
    ds = SingleCellMemMapDataset(path, load_neighbors=neighbors)
    n = len(ds)
    rows = [ds.get_row(i, return_var_features=True, return_obs_features=True) for i in range(n)]
    batch = collate_sparse_matrix_batch([ds[i] for i in range(n)])
    found.append({
        "shape": [n, [int(v) for v in ds.number_of_variables()]],
        "counts": [int(ds.number_of_values()), int(ds.number_nonzero_values())],
        "dtypes": sorted(ds.dtypes.items()),
        "values": [r[0][0].astype(float).tolist() for r in rows],
        "columns": [r[0][1].tolist() for r in rows],
        "var": [[[plain(x) for x in column] for column in r[1]] for r in rows],
        "obs": [[plain(x) for x in r[2]] for r in rows] if len(ds.obs_features()) else [],
        "batch": [batch.crow_indices().tolist(), batch.col_indices().tolist(), batch.values().tolist()],
        "neighbors": [
            [ds.get_neighbor_indices_for_cell(i).tolist(), ds.get_neighbor_weights_for_cell(i).tolist()]
            for i in range(n)
        ] if neighbors else [],
    })
print(json.dumps(found))
"""


def theirs(archives: list[tuple[Path, bool]]) -> list[dict[str, Any]]:
    """What the real package reads, all archives in one process."""
    asked = json.dumps([(str(path), neighbors) for path, neighbors in archives])
    done = subprocess.run(
        [os.environ["HBX_SCDL_PYTHON"], "-c", READ, asked], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def plain(value: Any) -> str:
    return "None" if value is None or value != value else str(value)


def ours(path: Path, neighbors: bool) -> dict[str, Any]:
    """The same questions to our own class."""
    ds = SingleCellMemMapDataset(path, load_neighbors=neighbors)
    n = len(ds)
    rows = [
        ds.get_row(i, return_var_features=True, return_obs_features=ds.obs_features() is not None)
        for i in range(n)
    ]
    batch = collate_sparse_matrix_batch([ds[i] for i in range(n)])
    return {
        "shape": [n, ds.number_of_variables()],
        "counts": [int(ds.number_of_values()), int(ds.number_nonzero_values())],
        "dtypes": [list(item) for item in sorted(ds.dtypes.items())],
        "values": [np.asarray(r[0][0], float).tolist() for r in rows],
        "columns": [r[0][1].tolist() for r in rows],
        "var": [[[plain(x) for x in column] for column in r[1]] for r in rows],
        "obs": [[plain(x) for x in r[2]] for r in rows] if len(ds.obs_features()) else [],
        "batch": [batch.crow_indices().tolist(), batch.col_indices().tolist(), batch.values().tolist()],
        "neighbors": [
            [ds.get_neighbor_indices_for_cell(i).tolist(), ds.get_neighbor_weights_for_cell(i).tolist()]
            for i in range(n)
        ]
        if neighbors
        else [],
    }


def compare(archives: list[tuple[Path, bool]]) -> None:
    for (path, neighbors), there in zip(archives, theirs(archives), strict=True):
        here = ours(path, neighbors)
        for key in there:
            assert here[key] == there[key], (path, key)


def test_archives_of_the_real_package_read_alike(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    """All that it reads rightly itself: the same answers to every question."""
    import shutil

    archives = []
    for name, case in scdl_cases.items():
        if case.info["must_raise"] or not case.info["real_reader_0_1_3_is_right"]:
            continue
        if name.startswith("legacy"):
            continue  # it reports no obs there where we say that there is none
        # Opening in the real package writes.
        path = Path(shutil.copytree(case.archive, tmp_path / name))
        archives.append((path, name == "neighbors"))
    assert len(archives) > 10
    compare(archives)


def test_the_real_package_opens_what_we_write(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    """Conversion of every kind of matrix and dtype, cast, concatenation, and the way through an atlas."""
    x = files.counts(30, 40)
    made: list[tuple[Path, bool]] = []
    for k, matrix in enumerate((x, x.tocsc(), x.toarray())):
        convert_h5ad(files.h5ad(tmp_path / f"{k}.h5ad", matrix), tmp_path / f"kind{k}")
        made.append((tmp_path / f"kind{k}", False))
    for dtype in ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64", "auto"):
        convert_h5ad(tmp_path / "0.h5ad", tmp_path / dtype, data_dtype=dtype)
        made.append((tmp_path / dtype, False))
    cast_archive(tmp_path / "uint8", "float64")

    adata = files.adata(x, seed=1)
    adata.obsp["next"] = sp.random(30, 30, 0.1, "csr", random_state=0)
    adata.write_h5ad(tmp_path / "n.h5ad")
    convert_h5ad(tmp_path / "n.h5ad", tmp_path / "n", options=ConvertOptions(neighbor_key="next"))
    convert_h5ad(files.h5ad(tmp_path / "o.h5ad", files.counts(300, 300, seed=2), genes="h"), tmp_path / "o")
    # Neighbours through a concatenation, more blocks than digits, wider columns and pointers.
    concat_archives([tmp_path / "n", tmp_path / "o", tmp_path / "n"], tmp_path / "joined")
    concat_archives([tmp_path / name for name in ["n", "o"] * 6], tmp_path / "twelve")
    made += [(tmp_path / "n", True), (tmp_path / "joined", True), (tmp_path / "twelve", True)]
    for name in ("ragged_ten", "ragged_two", "neighbors", "unsorted_columns"):
        archive_to_atlas(scdl_cases[name].archive, tmp_path / f"{name}-atlas")
        atlas_to_archive(tmp_path / f"{name}-atlas", tmp_path / name)
        made.append((tmp_path / name, name == "neighbors"))
    atlas_to_archive(tmp_path / "ragged_two-atlas", tmp_path / "union", union=True, keep_uids=True)
    made.append((tmp_path / "union", False))
    compare(made)


def test_the_real_package_goes_on_where_we_stopped(tmp_path: Path) -> None:
    """It appends to an archive of ours, and ours to what comes of that."""
    for k in (0, 1):
        convert_h5ad(files.h5ad(tmp_path / f"{k}.h5ad", files.counts(20, 15, seed=k)), tmp_path / f"{k}")
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as D\n"
        "a, b, out, h5ad = sys.argv[1:]\n"
        "D(out, h5ad, use_X_not_raw=True).concat([D(a), D(b)])\n"
    )
    command = [os.environ["HBX_SCDL_PYTHON"], "-c", program, str(tmp_path / "0"), str(tmp_path / "1")]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, str(out), str(tmp_path / "0.h5ad")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts = [files.content(tmp_path / name)["rows"] for name in ("0", "0", "1")]
    assert files.content(out)["rows"] == [row for part in parts for row in part]
    concat_archives([out, tmp_path / "1"], tmp_path / "more")
    compare([(tmp_path / "more", False)])
