"""Which genes were measured in a cell: of the others a model is neither shown a count nor asked for one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._lower_sampled import Prompt
from hbx_gpu.tokens._sampled import PromptQuery


@dataclass(frozen=True, slots=True)
class Measured:
    """Which features were measured in each cell of a batch.

    Attributes
    ----------
    masks
        bool (k, n_features). The distinct masks.
    of_row
        int (n,). The mask of each cell.
    """

    masks: np.ndarray
    of_row: np.ndarray


def needs_measured(compiled: Compiled) -> bool:
    """Whether a recipe depends on which genes were measured."""
    return isinstance(compiled.recipe, PromptQuery) and compiled.recipe.measured_only


def measured_in(compiled: Compiled, measured: np.ndarray | Measured | None, n: int) -> Measured | None:
    """What was passed to :func:`encode`, checked.

    Raises
    ------
    ValueError
        The recipe needs it and it is missing, or the other way round; its shape or dtype is wrong.
    """
    if not needs_measured(compiled):
        if measured is not None:
            raise ValueError("measured= is for recipes with measured_only=True, which this one is not")
        return None
    if measured is None:
        raise ValueError(
            "measured_only=True depends on which genes were measured in each cell: pass measured=, bool "
            "(n_rows, n_features), such as dataset.measured_masks(dataset.groups_of(rows)); loaders do so on "
            "their own"
        )
    if isinstance(measured, Measured):
        return measured
    masks = np.asarray(measured)
    if masks.dtype != np.bool_ or masks.shape != (n, compiled.n_features):
        raise ValueError(
            f"measured must be bool of shape {(n, compiled.n_features)}, a row for each cell and a column "
            f"for each feature; got {masks.dtype} of shape {masks.shape}"
        )
    return Measured(masks, np.arange(n))


def only_measured(compiled: Compiled, made: dict[str, np.ndarray], measured: Measured) -> None:
    """Hide genes that were not measured, in place: neither shown nor to guess.

    A gene that has several columns was measured where any of these was.
    """
    program, tables = compiled.program, compiled.tables
    assert isinstance(program, Prompt)
    n = len(made["lengths"])
    if not n:
        return
    n_genes = program.length - len(program.metadata_masks)
    of_token = np.zeros((len(measured.masks), int(tables.token.max()) + 1), np.bool_)
    for column in np.flatnonzero(tables.column >= 0).tolist():
        of_token[:, tables.token[tables.column[column]]] |= measured.masks[:, column]
    genes = {
        name: made[name].reshape(n, -1)[:, :n_genes]
        for name in ("input_ids", "values", "query_mask", "prompt_mask", "label_weights")
    }
    hidden = ~of_token[measured.of_row[:, None], genes["input_ids"]]
    for name in ("values", "query_mask", "prompt_mask"):
        genes[name][hidden] = 0
    queries = genes["query_mask"].astype(np.float64)
    genes["label_weights"][:] = queries / np.maximum(queries.sum(1, keepdims=True), 1.0) / n
