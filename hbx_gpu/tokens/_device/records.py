"""The records that kernels of tokens are given: field for field those of kernels/tokens.cuh."""

from __future__ import annotations

import numpy as np

RECIPE_TABLES = (
    "column", "token", "scale", "index", "known", "whole", "fraction", "quantiles", "ratios", "protect",
    "front_values", "back_values", "back", "chromosome", "place", "codes", "prefix_sums", "shown", "query",
    "hidden",
)  # fmt: skip
"""Arrays of a recipe, in the order of their addresses."""
_RECIPE_SIZES = (
    "n_features", "n_known", "n_quantiles", "n_ratios", "n_protect", "n_codes", "n_prefix", "n_shown",
    "n_hidden", "zeros", "logged", "ids_bytes",
)  # fmt: skip
RECIPE = np.dtype([(name, "<u8") for name in RECIPE_TABLES] + [(name, "<u4") for name in _RECIPE_SIZES])

_ROW_ADDRESSES = (
    "indices", "values", "offsets", "cells", "front", "shared", "shared_columns", "room", "genes", "counts",
    "n_genes", "totals", "known_totals", "lengths", "gen_lengths", "starts", "widths", "drafts", "work",
    "attention", "bounds", "ids", "values_out", "counts_out", "labels", "masked_values", "mask", "gen_ids",
    "gen_values", "task_ids", "task_values", "row_totals", "query_mask", "total_counts", "prompt_mask",
    "label_weights", "metadata_ids", "metadata_labels", "metadata_mask",
)  # fmt: skip
_ROW_SIZES = ("n_elements", "n_places", "capacity", "gen_capacity", "work_bytes", "seed")
_ROW_COUNTS = (
    "epoch", "n_rows", "value_type", "front_step", "padding", "multiple", "longest", "n_shared"
)  # fmt: skip
ROWS = np.dtype(
    [(name, "<u8") for name in (*_ROW_ADDRESSES, *_ROW_SIZES)]
    + [("gen_ratio", "<f8")]
    + [(name, "<u4") for name in _ROW_COUNTS]
)

TOO_MANY = 512
"""Status bit beside those of :mod:`hbx_gpu._engine.device.status`."""
