"""Statistics kept in an atlas: read again, never half written, for each snapshot and question; panels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu import RaggedAtlas
from hbx_gpu.atlas import create_or_open_atlas
from hbx_gpu.atlas._query import statistics as kept
from hbx_gpu.errors import UnknownNameError
from hbx_gpu.statistics import Statistics
from hbx_gpu.testing import example_atlas
from hbx_gpu.testing._examples import example_groups
from hbx_gpu.testing._stored import expected_dense
from tests.statistics.test_compute import check, equal, masks


def files(root: Path) -> list[str]:
    folder = root / kept.FOLDER
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def fail(*_: object, **__: object) -> Statistics:
    raise AssertionError("computed again")


def in_order(found: Statistics) -> np.ndarray:
    """Columns of f0 .. f49 among the features, which are ordered by name in no particular way."""
    place = {uid: i for i, uid in enumerate(found.feature_uids)}
    return np.array([place[f"f{i}"] for i in range(50) if f"f{i}" in place])


def test_equal_to_numpy_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = example_atlas(tmp_path)
    found = atlas.statistics("donor")
    groups = example_groups()
    names = [int(uid[1:]) for uid in found.feature_uids]
    dense, measured = expected_dense(groups, 50)[:, names], masks(groups, 50)[:, names]
    check(found, dense, measured)
    first = np.arange(120) % 60 % 2 == 0
    check(found.groups["d0"], dense[first], measured[first])
    assert len(files(tmp_path)) == 1
    monkeypatch.setattr("hbx_gpu.statistics.compute", fail)
    again = RaggedAtlas.checkout_latest(tmp_path).statistics("donor")
    assert equal(again, found)
    assert again.medians == found.medians
    with pytest.raises(AssertionError, match="computed again"):
        atlas.statistics()
    with pytest.raises(AssertionError, match="computed again"):
        atlas.query().where("donor = 'd0'").statistics("donor")
    with pytest.raises(AssertionError, match="computed again"):
        atlas.statistics("donor", keep=False)


def test_a_filter_selects_the_rows(tmp_path: Path) -> None:
    atlas = example_atlas(tmp_path)
    by = atlas.statistics("donor").groups["d1"]
    assert equal(atlas.query().where("donor = 'd1'").statistics(), by)
    assert len(files(tmp_path)) == 2


def test_a_damaged_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    atlas = example_atlas(tmp_path)
    found = atlas.statistics()
    (path,) = (tmp_path / kept.FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert equal(atlas.statistics(), found)
    assert "computed again" in caplog.text
    assert equal(Statistics.load(path), found)


def test_nothing_is_written_where_nothing_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = example_atlas(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refuse)
        found = atlas.statistics()
    assert files(tmp_path) == []
    with monkeypatch.context() as patch:  # a writer that dies between the two steps leaves no statistics
        patch.setattr("os.replace", refuse)
        atlas.statistics()
    assert files(tmp_path) == []
    assert equal(atlas.statistics(), found)
    assert len(files(tmp_path)) == 1


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    atlas = example_atlas(tmp_path / "atlas")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "atlas" / kept.FOLDER).symlink_to(tmp_path / "elsewhere")
    assert atlas.statistics().n_cells == 120
    assert not list((tmp_path / "elsewhere").iterdir())


def test_another_snapshot_has_its_own(tmp_path: Path) -> None:
    example_atlas(tmp_path).statistics()
    writer = create_or_open_atlas(tmp_path)
    with pytest.raises(RuntimeError, match="need a snapshot"):
        writer.statistics()
    writer.remove_dataset(str(writer.list_datasets()["dataset_uid"][0]))
    writer.optimize()
    writer.snapshot()
    assert RaggedAtlas.checkout_latest(tmp_path).statistics().n_cells == 60
    assert RaggedAtlas.checkout(tmp_path, 0).statistics().n_cells == 120
    assert len(files(tmp_path)) == 2


def test_panels_of_the_most_variable_features(tmp_path: Path) -> None:
    atlas = example_atlas(tmp_path)
    wanted = list(atlas.statistics().highly_variable(5).index)
    dataset = atlas.query().where("donor = 'd1'").features("hvg:5", "gene_expression").to_cell_dataset()
    assert dataset.feature_uids.tolist() == wanted
    assert len(dataset) == 60
    for wrong in ("hvg", "hvg:0", "hvg:-1", "f1", "top:5"):
        with pytest.raises(ValueError, match="'hvg:2000'"):
            atlas.query().features(wrong, "gene_expression")
    with pytest.raises(UnknownNameError, match="protein"):
        atlas.query().features("hvg:5", "protein")


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    atlas = example_atlas(tmp_path)
    with pytest.raises(UnknownNameError, match="cell_type"):
        atlas.statistics("cell_type")
    with pytest.raises(UnknownNameError, match="spliced"):
        atlas.statistics(layer="spliced")


def test_a_misspelled_option_answers_no_other_question(tmp_path: Path) -> None:
    atlas = example_atlas(tmp_path)
    with pytest.raises(TypeError, match="no argument 'layers'; it has by, feature_space, layer"):
        atlas.statistics(layers="log_normalized")  # type: ignore[call-arg]


@pytest.mark.parametrize("target_sum", [0, -1.0, float("nan"), float("inf")])
def test_totals_are_scaled_to_more_than_nothing(tmp_path: Path, target_sum: float) -> None:
    with pytest.raises(ValueError, match="target_sum must be above 0"):
        example_atlas(tmp_path).statistics(target_sum=target_sum)
