"""Which files are compared with each other, and how many cells until they count as the same or different."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import hbx_gpu
from hbx_gpu.atlas import DenseZarrPointer, HoxBaseSchema, PointerField, create_or_open_atlas
from hbx_gpu.atlas._ingest.batch import Batch
from hbx_gpu.atlas._ingest.duplicates import MOST_COUNTS, _are_mostly_same, _Values
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.errors import AlreadyIngestedError


class Answers(_Values):
    """Pairs of cells that are known to be the same, or not, or to say nothing."""

    def __init__(self, answers: list[bool | None]) -> None:
        super().__init__(Path(), get_space("gene_expression"))
        self.answers, self.asked = answers, 0

    def same(self, one: Mapping[str, object], _other: Mapping[str, object]) -> bool | None:
        self.asked += 1
        place = one["place"]
        assert isinstance(place, int)
        return self.answers[place]


def decided(read: Answers) -> bool:
    return _are_mostly_same(read, [({"place": k}, {}) for k in range(len(read.answers))])


def test_pairs_are_looked_at_as_long_as_they_may_be_the_same() -> None:
    rng = random.Random(0)
    for _ in range(3_000):
        share = rng.random()
        weights = (share, share / 3, 0.2)
        answers = rng.choices((True, False, None), weights, k=rng.randint(0, 20))
        said = [answer for answer in answers if answer is not None]
        expected = bool(said) and sum(said) >= MOST_COUNTS * len(said)
        assert decided(Answers(answers)) == expected, answers


def test_different_cells_are_told_apart_by_a_few() -> None:
    read = Answers([False] * 64)
    assert not decided(read)
    assert read.asked == 13


def cells(seed: int, n_genes: int = 90) -> anndata.AnnData:
    """Cells with the names that anndata gives to all files: 0, 1, 2, ..."""
    counts = sp.random(40, n_genes, density=0.4, format="csr", random_state=seed)
    counts.data = np.ceil(9 * counts.data)
    return anndata.AnnData(counts.astype(np.float32))


def test_files_that_number_their_cells_are_added_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not compared with each other, which would take a commit and many reads per file."""
    commits = []
    commit = Batch.commit

    def counted(batch: Batch) -> None:
        commits.append(len(batch))
        commit(batch)

    monkeypatch.setattr(Batch, "commit", counted)
    monkeypatch.setattr(_Values, "same", lambda *_: pytest.fail("values are compared"))
    for i in range(6):
        cells(i).write_h5ad(tmp_path / f"{i}.h5ad")
    report = hbx_gpu.ingest_many(tmp_path / "atlas", sorted(tmp_path.glob("*.h5ad")))
    assert report.n_added == 6
    assert max(commits) == 6


@pytest.mark.parametrize("together", [False, True])
def test_the_same_numbered_cells_in_another_file_are_found(tmp_path: Path, together: bool) -> None:
    for i in range(3):
        cells(i).write_h5ad(tmp_path / f"{i}.h5ad")
    again = cells(1)
    changed = again.X.tolil()
    changed[:3] = 0  # fewer than a fifth of the cells
    again.X = changed.tocsr()
    again.obs["batch"] = "a"
    again.write_h5ad(tmp_path / "again.h5ad")
    files = sorted(tmp_path.glob("?.h5ad"))
    if not together:
        hbx_gpu.ingest_many(tmp_path / "atlas", files)
    sources = [*files, tmp_path / "again.h5ad"] if together else [tmp_path / "again.h5ad"]
    with pytest.raises(AlreadyIngestedError, match=r"cells are in the atlas already.*from '1\.h5ad'"):
        hbx_gpu.ingest_many(tmp_path / "atlas", sources)


def test_a_file_of_the_same_name_with_other_values_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        cells(i).write_h5ad(folder / "counts.h5ad")
    report = hbx_gpu.ingest_many(tmp_path / "atlas", [folder / "counts.h5ad" for folder in folders])
    assert report.n_added == 2
    assert "40 of its cells have the names of cells of dataset" in caplog.text


class Unnamed(HoxBaseSchema):
    """Cells with a dense matrix, and without names."""

    protein_abundance: DenseZarrPointer | None = PointerField.declare(feature_space="protein_abundance")


class Proteins(Unnamed):
    """Cells with a dense matrix and names."""

    obs_name: str | None = None


def protein_files(folder: Path) -> list[Path]:
    for i in range(2):
        proteins = np.random.default_rng(i).integers(0, 9, (40, 5)).astype(np.float32)
        anndata.AnnData(proteins).write_h5ad(folder / f"{i}.h5ad")
    return sorted(folder.glob("*.h5ad"))


def test_dense_files_are_told_apart_by_values(tmp_path: Path) -> None:
    """Cells of a dense matrix have as many values each, so names alone say which files to compare."""
    files = protein_files(tmp_path)
    atlas = create_or_open_atlas(tmp_path / "atlas", {"cells": Proteins})
    assert hbx_gpu.ingest_many(atlas, files, field_name="protein_abundance").n_added == 2
    again = anndata.read_h5ad(files[0])
    again.obs["batch"] = "a"
    again.write_h5ad(tmp_path / "again.h5ad")
    with pytest.raises(AlreadyIngestedError, match=r"40 of its 40 cells .*from '0\.h5ad'"):
        hbx_gpu.ingest_many(atlas, [tmp_path / "again.h5ad"], field_name="protein_abundance")


def test_files_for_an_atlas_without_names_are_all_added(tmp_path: Path) -> None:
    """Its table does not say which cells are the same."""
    files = protein_files(tmp_path)
    atlas = create_or_open_atlas(tmp_path / "atlas", {"cells": Unnamed})
    report = hbx_gpu.ingest_many(atlas, files, field_name="protein_abundance")
    assert report.n_added == 2
