"""Rows to tokens: one call for a batch, in whatever form its rows come, by the engine that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu import _draws
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens._by_row import reference
from hbx_gpu.tokens._cells import Cells, Engine, Options, check_options
from hbx_gpu.tokens._compile import Compiled, compile_recipe, renamed
from hbx_gpu.tokens._host.engine import host
from hbx_gpu.tokens._measured import Measured, measured_in, only_measured
from hbx_gpu.tokens._recipes import ObsTokens, Recipe

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from scipy import sparse

ENGINES: dict[str, Engine] = {"host": host, "reference": reference}
"""Engines by name."""


def encode(
    rows: SparseBatch | sparse.csr_matrix | sparse.csr_array,
    recipe: Recipe | Compiled,
    feature_uids: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
    epoch: int = 0,
    cells: Sequence[int] | np.ndarray | None = None,
    *,
    batch: int | None = None,
    obs: Mapping[str, ArrayLike] | None = None,
    padding: str = "longest",
    pad_to_multiple_of: int | None = None,
    ids_dtype: str = "int64",
    engine: str = "host",
    measured: np.ndarray | Measured | None = None,
    where: str = "the values of these rows",
) -> dict[str, np.ndarray]:
    """Tokens of rows, as a loader with ``layout="tokens"`` hands them out.

    Parameters
    ----------
    rows
        Counts of n cells: a :class:`~hbx_gpu.SparseBatch`, or a scipy CSR matrix or array.
    recipe
        What the model is fed: one of :mod:`hbx_gpu.tokens`, or what :func:`compile` made of it.
    feature_uids
        (n_features,), the uid of each column. May be left out where the recipe is compiled.
    seed, epoch
        What is drawn at random depends on these, the cell and the gene only.
    cells
        int (n,), row numbers of the dataset. None: column ``index`` of the batch's metadata where it has one,
        else 0 .. n - 1.
    batch
        Number of the batch, for what is drawn once a batch; None: the first of `cells`.
    obs
        Columns that the recipe reads, n values each, where the batch's metadata does not hold them.
    padding
        ``"longest"`` row of the batch, the recipe's ``"max_length"``, or ``"packed"``: rows end to end.
    pad_to_multiple_of
        Round the width up.
    ids_dtype
        ``"int64"`` or ``"int32"``, of ids and labels.
    engine
        ``"host"`` (numba), or ``"reference"`` (NumPy, slow); both make the same bits.
    measured
        bool (n, n_features), which features were measured in each cell, for recipes with
        ``measured_only=True``.
    where
        What holds the rows, for messages.

    Returns
    -------
    dict
        ``input_ids`` (n, width); ``attention_mask``, bool, True at tokens; ``lengths``, int32 (n,); and as
        the recipe says ``values``, ``masked_values``, ``counts`` (float32), ``labels`` (-100 where nothing is
        hidden), ``mask`` (bool), and what docs/tokens.md lists. Packed: ``input_ids`` (sum of lengths,),
        ``cu_seqlens``, int32 (n + 1,), and ``max_seqlen`` instead of the attention mask.

    Raises
    ------
    InvalidDataError
        Values that are not counts; another feature space than the recipe was compiled for; a vocabulary that
        matches nothing.
    ValueError
        The recipe is not compiled and `feature_uids` is missing, an option has an unknown value, or
        `measured` is missing where the recipe needs it.
    """
    options = Options(padding, pad_to_multiple_of or 1, ids_dtype)
    if isinstance(recipe, Compiled):
        compiled = recipe
        if feature_uids is not None:
            compiled.check_features(feature_uids)
    elif feature_uids is None:
        raise ValueError("feature_uids: pass the uid of each column; tokens are looked up by uid")
    else:
        compiled = compile_recipe(recipe, feature_uids)
    check_options(compiled, options)
    offsets, columns, values, width, metadata = _csr(rows)
    if width != compiled.n_features:
        raise InvalidDataError(
            f"the rows have {width} columns, and the recipe was compiled for {compiled.n_features} features"
        )
    n = len(offsets) - 1
    if cells is None:
        cells = metadata.get("index", np.arange(n))
    numbers = np.asarray(cells, np.int64)
    if len(numbers) != n:
        raise ValueError(f"cells must name each of the {n} rows, got {len(numbers)} numbers")
    _draws.check(seed, epoch, numbers)
    if n and numbers.max() >= _draws.MAX_CELLS:
        raise ValueError(f"cells must lie below 2**40, got {numbers.max()}")
    if batch is None:
        batch = int(numbers[0]) if n else 0
    columns_of_obs = {**metadata, **{name: np.asarray(column) for name, column in (obs or {}).items()}}
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    one = Cells(
        offsets, columns, values, front_ids(compiled, columns_of_obs, n), numbers, seed, epoch, batch, where,
        aux_ids(compiled, columns_of_obs, n),
    )  # fmt: skip
    known = measured_in(compiled, measured, n)
    made = ENGINES[engine](compiled, one, options)
    if known is not None:
        only_measured(compiled, made, known)
    return finish(compiled, made, one, options)


def finish(
    compiled: Compiled, made: dict[str, np.ndarray], cells: Cells, options: Options
) -> dict[str, np.ndarray]:
    """The batch: attention mask or sequence bounds, ids of obs columns, and the model's own names."""
    lengths = made["lengths"]
    if options.padding == "packed":
        bounds = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=bounds[1:])
        made["cu_seqlens"] = bounds
        made["max_seqlen"] = np.int32(lengths.max(initial=0))  # type: ignore[assignment]
    else:
        width = made["input_ids"].shape[1]
        short = "uint16" if width < 2**16 else "uint32"  # twice as many at a time
        made["attention_mask"] = np.arange(width).astype(short) < lengths.astype(short)[:, None]
    made.update(cells.obs)
    return renamed(compiled, made)


def front_ids(compiled: Compiled, obs: Mapping[str, object], n: int) -> np.ndarray:
    """int64 (n, k), or (1, k) where all cells have the same."""
    if not any(isinstance(token, ObsTokens) for token in compiled.front):
        return np.array([compiled.front], np.int64).reshape(1, len(compiled.front))
    ids = np.empty((n, len(compiled.front)), np.int64)
    for k, token in enumerate(compiled.front):
        ids[:, k] = obs_ids(token, obs, n) if isinstance(token, ObsTokens) else token
    return ids


def aux_ids(compiled: Compiled, obs: Mapping[str, object], n: int) -> dict[str, np.ndarray]:
    """int64 (n,) or (n, k) by name."""
    found = {}
    for name, entry in compiled.recipe.aux.items():
        if isinstance(entry, tuple):
            found[name] = np.stack([obs_ids(one, obs, n) for one in entry], axis=1)
        else:
            found[name] = obs_ids(entry, obs, n)
    return found


def obs_ids(tokens: ObsTokens, obs: Mapping[str, object], n: int) -> np.ndarray:
    """int64 (n,). Values of one obs column as ids."""
    if tokens.column not in obs:
        raise InvalidDataError(
            f"the recipe reads obs column {tokens.column!r}, and the batch has {sorted(obs) or 'none'}: "
            "open the "
            "dataset with that column among metadata_columns, or pass obs= to encode"
        )
    column = np.asarray(obs[tokens.column])
    if len(column) != n:
        raise ValueError(f"obs column {tokens.column!r} must have {n} values, got {len(column)}")
    known: dict[object, int] = {}
    ids = np.empty(n, np.int64)
    for i, value in enumerate(column.tolist()):
        if value not in known:
            known[value] = tokens.id_of(value)
        ids[i] = known[value]
    return ids


def _csr(
    rows: SparseBatch | sparse.csr_matrix | sparse.csr_array,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, Mapping[str, np.ndarray]]:
    """Offsets, columns, values, width and metadata of rows."""
    if isinstance(rows, SparseBatch):
        return rows.offsets, rows.indices, rows.values, rows.n_features, rows.metadata or {}
    if getattr(rows, "format", None) == "csr":  # of scipy, whose classes would have to be imported
        return rows.indptr.astype(np.int64), rows.indices, rows.data, rows.shape[1], {}
    raise TypeError(
        f"rows must be a SparseBatch or a scipy CSR matrix, got a {type(rows).__name__}; "
        "scipy.sparse.csr_matrix(rows) makes one of a NumPy array or of another scipy matrix"
    )
