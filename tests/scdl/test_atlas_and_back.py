"""Archive to atlas and back: real archives without loss, kept and generic ways, the command, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu._engine.host.dense import densify
from hbx_gpu.atlas import RaggedAtlas, add_from_h5ad, create_or_open_atlas
from hbx_gpu.cli import main
from hbx_gpu.errors import AlreadyIngestedError, InvalidDataError, UnsupportedError
from hbx_gpu.scdl import open_archive
from hbx_gpu.scdl._atlases.from_atlas import atlas_to_archive
from hbx_gpu.scdl._atlases.to_atlas import archive_to_atlas
from hbx_gpu.scdl._sources.cells import to_cell_dataset
from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad
from tests.scdl import files
from tests.scdl.conftest import Case, Handmade

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES = [
    "single_f32",
    "ragged_two",
    "merge_blocks",
    "neighbors",
    "raw_default",
    "unsorted_columns",
    "empty_rows",
    "index_only",
    "stale_cast_same_width",
    "legacy_v007_float64",
    "all_dtypes_float16",
    "all_dtypes_uint64",
    "all_dtypes_uint8",
    "ragged_ten",
]


def dense(archive: Path) -> dict[str, dict[str, float]]:
    """Nonzeros by row and gene id, of archives with ids."""
    dataset = to_cell_dataset(archive)
    values = densify(dataset[:], dtype="float64")
    return {
        str(i): {str(dataset.feature_uids[j]): float(row[j]) for j in np.flatnonzero(row)}
        for i, row in enumerate(values)
    }


@pytest.mark.parametrize("name", CASES)
def test_real_archives_come_back(scdl_cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    archive = scdl_cases[name].archive
    seen: list[tuple[int, int]] = []
    n = archive_to_atlas(archive, tmp_path / "atlas", progress=lambda *done: seen.append(done))
    assert n == open_archive(archive).n_rows
    assert seen[-1] == (n, n)

    # The atlas itself has the same rows, by gene id.
    dataset = (
        RaggedAtlas.checkout_latest(tmp_path / "atlas")
        .query()
        .to_cell_dataset(layer="log_normalized" if name == "legacy_v007_float64" else None)
    )
    batch: Any = dataset[:]
    found = densify(batch, dtype="float64")
    original = to_cell_dataset(archive)
    place = {uid: i for i, uid in enumerate(dataset.feature_uids)}
    columns = [place[uid] for uid in original.feature_uids]
    assert np.array_equal(found[:, columns], densify(original[:], dtype="float64"))

    assert atlas_to_archive(tmp_path / "atlas", tmp_path / "back") == n
    before, after = files.content(archive), files.content(tmp_path / "back")
    if name.startswith("legacy"):  # pointers in the smallest dtype
        before["dtypes"][2] = after["dtypes"][2]
    assert after == before

    # Without what was kept beside the tables: the same matrix, genes and cells.
    shutil.rmtree(tmp_path / "atlas" / "scdl_origin")
    atlas_to_archive(tmp_path / "atlas", tmp_path / "generic", data_dtype=before["dtypes"][0])
    generic = files.content(tmp_path / "generic")
    assert generic["rows"] == before["rows"]
    assert generic["dtypes"][0] == before["dtypes"][0]
    assert generic["bounds"] == before["bounds"]
    assert dense(tmp_path / "generic") == dense(archive)
    original_obs: Any = open_archive(archive).obs
    obs = open_archive(tmp_path / "generic").obs
    assert obs is not None
    for column in original_obs.names if original_obs is not None else []:
        assert obs.column(column).to_pylist() == original_obs.column(column).to_pylist()


def test_names_categories_and_neighbors_come_back(tmp_path: Path) -> None:
    import scipy.sparse as sp

    adata = files.adata(files.counts(30, 12))
    adata.obsp["next"] = sp.random(30, 30, 0.1, "csr", random_state=0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    convert_h5ad(tmp_path / "a.h5ad", tmp_path / "archive", options=ConvertOptions(neighbor_key="next"))
    archive_to_atlas(tmp_path / "archive", tmp_path / "atlas")
    atlas_to_archive(tmp_path / "atlas", tmp_path / "back")
    before, after = files.content(tmp_path / "archive"), files.content(tmp_path / "back")
    assert after == before
    assert before["cells"][:2] == ["c0", "c1"]
    assert before["neighbors"] is not None
    opened: list[Any] = [open_archive(tmp_path / name).obs for name in ("archive", "back")]
    kinds = [obs.frames[0].arrow("kind").type for obs in opened]
    assert kinds[0] == kinds[1]


def test_an_atlas_becomes_an_archive_and_an_atlas(real_h5ad: tuple[Path, Path], tmp_path: Path) -> None:
    """Both real files: counts, ids, names and obs through an archive into another atlas."""
    atlas = create_or_open_atlas(tmp_path / "atlas")
    for file in real_h5ad:
        add_from_h5ad(atlas, file)
    atlas.optimize()
    atlas.snapshot()
    n = atlas_to_archive(tmp_path / "atlas", tmp_path / "archive")
    opened = open_archive(tmp_path / "archive")
    assert len(opened.bounds) == 3
    assert opened.data.dtype == np.uint16
    archive_to_atlas(tmp_path / "archive", tmp_path / "again")
    one, two = (RaggedAtlas.checkout_latest(tmp_path / name).query() for name in ("atlas", "again"))
    first, second = one.to_cell_dataset(), two.to_cell_dataset()
    assert len(first) == len(second) == n
    place = {uid: i for i, uid in enumerate(second.feature_uids)}
    mapped = np.array([place[uid] for uid in first.feature_uids])
    for begin in range(0, n, 2000):
        a: Any = first[begin : begin + 2000]
        b: Any = second[begin : begin + 2000]
        assert np.array_equal(a.values, b.values)
        assert np.array_equal(mapped[a.indices], b.indices)
    assert one.to_modality_obs()["obs_name"].to_pylist() == two.to_modality_obs()["obs_name"].to_pylist()


def test_one_block_with_all_genes(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    archive = scdl_cases["ragged_two"].archive
    archive_to_atlas(archive, tmp_path / "atlas")
    atlas_to_archive(tmp_path / "atlas", tmp_path / "union", union=True, keep_uids=True)
    opened: Any = open_archive(tmp_path / "union")
    assert opened.n_vars == [120]
    assert {"uid", "dataset_uid"} <= set(opened.obs.names)
    assert len(set(opened.obs.column("uid").to_pylist())) == 43
    assert dense(tmp_path / "union") == dense(archive)


def test_cells_and_genes_with_names_only(tmp_path: Path) -> None:
    counts = np.arange(6, dtype=np.float32).reshape(3, 2)
    names = pd.DataFrame(index=["AACG", "CCGT", "GGTA"]), pd.DataFrame(index=["GENE1", "GENE2"])
    atlas = create_or_open_atlas(tmp_path / "atlas")
    atlas.add_from_anndata(ad.AnnData(sp.csr_matrix(counts), *names))
    atlas.optimize()
    atlas.snapshot()
    assert atlas_to_archive(tmp_path / "atlas", tmp_path / "archive") == 3
    assert open_archive(tmp_path / "archive").var.frames[0]["feature_id"].tolist() == ["GENE1", "GENE2"]
    assert dense(tmp_path / "archive")["2"] == {"GENE1": 4.0, "GENE2": 5.0}


def test_a_dense_space_has_no_archive(tmp_path: Path) -> None:
    names = pd.DataFrame(index=["AACG", "CCGT"]), pd.DataFrame(index=["CD3", "CD4", "CD8"])
    atlas = create_or_open_atlas(tmp_path / "atlas", pointer_fields={"protein": "protein_abundance"})
    atlas.add_from_anndata(ad.AnnData(np.ones((2, 3), np.float32), *names), field_name="protein")
    atlas.optimize()
    atlas.snapshot()
    with pytest.raises(UnsupportedError, match="is dense, and archives hold sparse counts"):
        atlas_to_archive(tmp_path / "atlas", tmp_path / "archive", layer="counts")
    assert not (tmp_path / "archive").exists()


def test_what_is_added_later_is_not_lost(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    """What was kept speaks for its own snapshot only."""
    archive_to_atlas(scdl_cases["single_f32"].archive, tmp_path / "atlas")
    archive_to_atlas(scdl_cases["uint16_counts"].archive, tmp_path / "atlas")
    atlas_to_archive(tmp_path / "atlas", tmp_path / "back")
    opened = open_archive(tmp_path / "back")
    assert opened.bounds.tolist() == [0, 40, 70]
    rows = files.content(tmp_path / "back")["rows"]
    parts = [files.content(scdl_cases[name].archive)["rows"] for name in ("single_f32", "uint16_counts")]
    assert rows == [*parts[0], *parts[1]]


def test_what_was_kept_is_for_its_own_snapshot(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    archive_to_atlas(scdl_cases["single_f32"].archive, tmp_path / "atlas")
    first = RaggedAtlas.checkout_latest(tmp_path / "atlas").version
    RaggedAtlas.open(tmp_path / "atlas").snapshot()
    atlas_to_archive(tmp_path / "atlas", tmp_path / "newest")
    assert open_archive(tmp_path / "newest").data.dtype == np.uint8  # the smallest, of an unknown past
    atlas_to_archive(tmp_path / "atlas", tmp_path / "first", version=first)
    assert files.content(tmp_path / "first") == files.content(scdl_cases["single_f32"].archive)


def test_a_stopped_conversion_goes_on(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    archive = scdl_cases["ragged_two"].archive

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Stopped

    with pytest.raises(Stopped):
        archive_to_atlas(archive, tmp_path / "atlas", progress=stop)
    assert archive_to_atlas(archive, tmp_path / "atlas") == 25  # the first 18 are there
    atlas_to_archive(tmp_path / "atlas", tmp_path / "back")
    assert files.content(tmp_path / "back") == files.content(archive)
    assert archive_to_atlas(archive, tmp_path / "atlas") == 0
    with pytest.raises(AlreadyIngestedError):
        archive_to_atlas(archive, tmp_path / "atlas", layer="log_normalized")
    # On the way back an error leaves nothing.
    with pytest.raises(Stopped):
        atlas_to_archive(tmp_path / "atlas", tmp_path / "broken", progress=stop)
    assert not (tmp_path / "broken").exists()
    assert files.leftovers(tmp_path) == []


def test_values_that_a_layer_cannot_hold(handmade: Handmade, tmp_path: Path) -> None:
    handmade.data = np.full(len(handmade.data), 0.1, "f8")
    archive = handmade.write()
    with pytest.raises(InvalidDataError, match=r"holds 0\.1; float32 cannot hold it exactly"):
        archive_to_atlas(archive, tmp_path / "atlas")
    archive_to_atlas(archive, tmp_path / "atlas", allow_loss=True)
    atlas_to_archive(tmp_path / "atlas", tmp_path / "back")
    opened = open_archive(tmp_path / "back")
    assert opened.data.dtype == np.float64
    assert np.array_equal(opened.data, np.full(len(handmade.data), np.float32(0.1)).astype("f8"))


def test_genes_described_differently_are_said(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"column 'length' of var has 400 for gene 'RENSG\d+' in block 0"):
        archive_to_atlas(scdl_cases["ragged_two"].archive, tmp_path / "atlas")


def test_the_command(scdl_cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = scdl_cases["ragged_two"].archive
    atlas, back = tmp_path / "atlas", tmp_path / "back"

    def run(*args: Any) -> tuple[int, str, str]:
        status = main(["convert", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    status, out, err = run(archive, atlas, "--codec", "zstd")
    assert status == 0
    assert "43 cells" in out
    assert "warning: " in err
    assert "length" in err
    assert run(atlas, back)[0] == 0
    assert files.content(back) == files.content(archive)
    status, _, err = run(atlas, back)
    assert status == 1
    assert "--overwrite" in err
    assert run(atlas, back, "--overwrite", "--data-dtype", "float64")[0] == 0
    assert open_archive(back).data.dtype == np.float64
    status, _, err = run(atlas, tmp_path / "b", "--codec", "zstd", "--feature-id", "x")
    assert (status, "--codec, --feature-id-column cannot be used" in err) == (1, True)
    status, _, err = run(tmp_path / "none", tmp_path / "b")
    assert (status, "nothing is there" in err) == (1, True)
    source = files.h5ad(tmp_path / "s.h5ad", files.counts(9, 5))
    assert run(source, tmp_path / "made")[0] == 0
    assert open_archive(tmp_path / "made").data.dtype == np.uint8
