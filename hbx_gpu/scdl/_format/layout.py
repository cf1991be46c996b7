"""Names of the files of an archive, and the release of SCDL whose layout is written."""

from __future__ import annotations

from enum import StrEnum

# Programs that compare versions expect one of theirs.
LAYOUT_VERSION = "0.1.3"


class FileNames(StrEnum):
    """Files of an archive."""

    DATA = "data.npy"
    COLPTR = "col_ptr.npy"
    ROWPTR = "row_ptr.npy"
    METADATA = "metadata.json"
    DTYPE = "dtypes.json"
    FEATURES = "features"
    VAR_FEATURES = "var_features"
    OBS_FEATURES = "obs_features"
    VERSION = "version.json"
    HEADER = "header.sch"
    NEIGHBOR_INDICES = "neighbor_indices.npy"
    NEIGHBOR_INDICES_PTR = "neighbor_indptr.npy"
    NEIGHBOR_VALUES = "neighbor_values.npy"


DATA, ROW_PTR, COL_PTR = FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value
HEADER, METADATA, VERSION = FileNames.HEADER.value, FileNames.METADATA.value, FileNames.VERSION.value
VAR_FEATURES, OBS_FEATURES = FileNames.VAR_FEATURES.value, FileNames.OBS_FEATURES.value
OLD_FEATURES = FileNames.FEATURES.value
"""Where releases up to 0.1.2 have the genes."""
NEIGHBOR_FILES = (
    FileNames.NEIGHBOR_INDICES_PTR.value,
    FileNames.NEIGHBOR_INDICES.value,
    FileNames.NEIGHBOR_VALUES.value,
)
"""Pointers, row numbers, weights."""

# Of a feature index folder.
ENDS, LABELS, INDEX_VERSION = "cumulative_sum_index.npy", "labels.npy", "version.npy"
LABELS_JSON = "labels.json"
"""The labels again, as releases after 0.1.3 write them."""


def block_file(block: int, n_blocks: int) -> str:
    """Name of the parquet file of one of the blocks of a feature index."""
    return f"dataframe_{block:0{len(str(n_blocks))}d}.parquet"
