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
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu._commands.convert_h5ad_to_scdl import main
from hbx_gpu.scdl import SingleCellMemMapDataset, collate_sparse_matrix_batch, open_archive, read_header
from hbx_gpu.scdl._atlases.from_atlas import atlas_to_archive
from hbx_gpu.scdl._atlases.to_atlas import archive_to_atlas
from hbx_gpu.scdl._format.values import DATA_DTYPES
from hbx_gpu.scdl._writing.cast import cast_archive
from hbx_gpu.scdl._writing.concat import concat_archives
from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad
from hbx_gpu.scdl._writing.writer import ArchiveWriter
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
        "var": [[[plain(x) for x in column] for column in r[1] or ()] for r in rows],
        "obs": [[plain(x) for x in r[2] or ()] for r in rows] if len(ds.obs_features()) else [],
        "batch": [batch.crow_indices().tolist(), batch.col_indices().tolist(), batch.values().tolist()],
        "neighbors": [
            [ds.get_neighbor_indices_for_cell(i).tolist(), ds.get_neighbor_weights_for_cell(i).tolist()]
            for i in range(n)
        ] if neighbors else [],
    })
print(json.dumps(found))
"""


def run(program: str, *args: Any) -> str:
    command = [os.environ["HBX_SCDL_PYTHON"], "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def theirs(archives: list[tuple[Path, bool]]) -> list[dict[str, Any]]:
    """What the real package reads, all archives in one process."""
    asked = json.dumps([(str(path), neighbors) for path, neighbors in archives])
    found: list[dict[str, Any]] = json.loads(run(READ, asked).splitlines()[-1])
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
        "var": [[[plain(x) for x in column] for column in r[1] or ()] for r in rows],
        "obs": [[plain(x) for x in r[2] or ()] for r in rows] if len(ds.obs_features()) else [],
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
    for dtype in (*DATA_DTYPES, "auto"):
        convert_h5ad(tmp_path / "0.h5ad", tmp_path / dtype, data_dtype=dtype)
        made.append((tmp_path / dtype, False))
    cast_archive(tmp_path / "uint8", "float64")
    for name in ("ragged_ten", "ragged_two", "neighbors", "unsorted_columns"):
        archive_to_atlas(scdl_cases[name].archive, tmp_path / f"{name}-atlas")
        atlas_to_archive(tmp_path / f"{name}-atlas", tmp_path / name)
        made.append((tmp_path / name, name == "neighbors"))
    atlas_to_archive(tmp_path / "ragged_two-atlas", tmp_path / "union", union=True, keep_uids=True)
    made.append((tmp_path / "union", False))
    SingleCellMemMapDataset(tmp_path / "kind0").save(tmp_path / "copy")
    made.append((tmp_path / "copy", False))
    compare(made)


def test_many_blocks_with_neighbors_and_missing_values(tmp_path: Path) -> None:
    """More gene blocks than digits; columns and pointers that widen; every kind of obs column."""
    folder = tmp_path / "h5ad"
    folder.mkdir()
    for i in range(12):
        x = files.counts(3 + i % 2, 250 + max(i, 1), seed=i, high=60000)
        adata = files.adata({0: x, 1: x.tocsc(), 2: x.toarray()}[i % 3], genes=f"{max(i, 1)}_", cells=f"{i}_")
        adata.obs.loc[adata.obs.index[0], "kind"] = None
        if i == 5:  # no value at all among categories of the files before and after
            adata.obs["kind"] = pd.Categorical([None] * len(adata.obs), categories=["q"])
        adata.obs["flag"] = pd.array([True, None, *[False] * (len(adata.obs) - 2)], dtype="boolean")
        n = len(adata.obs)
        adata.obsp["next_cell_ids"] = sp.random(n, n, 0.5, "csr", random_state=i, dtype=np.float32)
        adata.write_h5ad(folder / f"{i:02d}.h5ad")
    arguments = ["--data-path", folder, "--save-path", tmp_path / "all", "--data-dtype", "auto"]
    assert main([str(a) for a in [*arguments, "--load-neighbors"]]) == 0
    assert len(open_archive(tmp_path / "all").n_vars) == 11
    assert open_archive(tmp_path / "all").data.dtype == np.uint16
    concat_archives([tmp_path / "all", tmp_path / "all"], tmp_path / "joined")
    compare([(tmp_path / "all", True), (tmp_path / "joined", True)])


def test_a_column_without_values_joins_categories(tmp_path: Path) -> None:
    """Arrow has a type for it, which some writer may have used; SCDL reads missing codes as the last one."""
    import pyarrow as pa

    categories = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["a", "b"]))
    with ArchiveWriter(tmp_path / "archive", n_columns=3) as writer:
        writer.append_rows(np.arange(5), np.zeros(4, "i8"), np.ones(4, "f4"))
        writer.append_var(pa.table({"gene": ["x", "y", "z"]}), 4, label="")
        for column in (categories, pa.nulls(2)):
            writer.append_obs(iter([pa.table({"kind": column})]), 2, label="")
    compare([(tmp_path / "archive", False)])
    kinds = SingleCellMemMapDataset(tmp_path / "archive").obs_features()[:]["kind"]
    assert kinds.tolist() == ["a", "b", None, None]


def test_nothing_stored(tmp_path: Path) -> None:
    """It counts the one element of padding as stored, but no row has it."""
    adata = files.adata(sp.csr_matrix((4, 3), dtype="f4"))
    adata.obsp["next_cell_ids"] = sp.csr_matrix((4, 4), dtype="f4")
    adata.write_h5ad(tmp_path / "x.h5ad")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a", options=ConvertOptions(neighbor_key="next_cell_ids"))
    (there,) = theirs([(tmp_path / "a", True)])
    assert there["values"] == [[]] * 4
    assert there["neighbors"] == [[[], []]] * 4


def test_headers_as_text_are_the_same(scdl_cases: dict[str, Case]) -> None:
    file = scdl_cases["ragged_ten"].archive / "header.sch"
    program = (
        "import sys; from bionemo.scdl.schema.header import SCDLHeader as H\n"
        "h = H.load(sys.argv[1]); print(h.to_json(), h.to_yaml(), sep='----\\n')"
    )
    as_json, as_yaml = run(program, file).split("----\n")
    assert read_header(file).to_json() == as_json.strip()
    assert read_header(file).to_yaml().strip() == as_yaml.strip()


def test_the_real_package_goes_on_where_we_stopped(tmp_path: Path) -> None:
    """It appends archives of ours, and ours to what comes of that."""
    for k in (0, 1):
        # Of the same genes: it cannot join reopened archives of different ones.
        convert_h5ad(files.h5ad(tmp_path / f"{k}.h5ad", files.counts(20, 15, seed=k)), tmp_path / f"{k}")
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as D\n"
        "a, b, out, joined, h5ad = sys.argv[1:]\n"
        "D(out, h5ad, use_X_not_raw=True).concat([D(a), D(b)])\n"
        "D(a).concat([D(b)], output_path=joined)\n"
    )
    out, joined = tmp_path / "out", tmp_path / "joined"
    run(program, tmp_path / "0", tmp_path / "1", out, joined, tmp_path / "0.h5ad")
    parts = [files.content(tmp_path / name) for name in ("0", "0", "1")]
    assert files.content(out)["rows"] == [row for part in parts for row in part["rows"]]
    found = files.content(joined)
    assert found["rows"] == [row for part in parts[1:] for row in part["rows"]]
    # Names of cells that it did not carry along are unknown, not shifted.
    assert found["cells"] is None
    assert found["genes"] == parts[0]["genes"]
    concat_archives([out, tmp_path / "1"], tmp_path / "more")
    compare([(tmp_path / "more", False)])
