"""Chromatin accessibility: fragments as ragged intervals, or counted over bins or peaks at load."""

from __future__ import annotations

from hbx_gpu.chromatin._counting import count_fragments
from hbx_gpu.chromatin._dataset import FragmentMatrixDataset
from hbx_gpu.chromatin._intervals import Fragments, fragments_frame, fragments_of, read_fragments
from hbx_gpu.chromatin._regions import Bins, Peaks, Regions

__all__ = [
    "Bins",
    "FragmentMatrixDataset",
    "Fragments",
    "Peaks",
    "Regions",
    "count_fragments",
    "fragments_frame",
    "fragments_of",
    "read_fragments",
]
