"""What became of the files of an ingest of many."""

from __future__ import annotations

from dataclasses import dataclass

from hbx_gpu._identity.choice import FeatureChoice


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Attributes
    ----------
    source
        Path of the file, as it was given.
    dataset_uid, n_cells
        Uid of the dataset, and the number of cells that were added: 0 where they had been before.
    matrix
        Matrix that was read, in words.
    choice
        How its features are identified; None for a file of several modalities.
    """

    source: str
    dataset_uid: str
    n_cells: int
    matrix: str = ""
    choice: FeatureChoice | None = None


@dataclass(frozen=True)
class ManyReport:
    """What became of all files.

    Attributes
    ----------
    files
        One report per file, in the order given; files of several modalities come last.
    """

    files: tuple[FileReport, ...]

    @property
    def n_cells(self) -> int:
        """Number of cells added."""
        return sum(file.n_cells for file in self.files)

    @property
    def n_added(self) -> int:
        """Number of files added."""
        return sum(file.n_cells > 0 for file in self.files)
