"""Split rows into training, validation and test rows: by fractions, within strata, and by whole groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._position import at_least
from hbx_gpu.sampler._runs import integers, number


def split_rows(
    n_rows: int,
    fractions: Mapping[str, float],
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Split row numbers at random; the same arguments always give the same split.

    Parameters
    ----------
    n_rows
        Number of rows.
    fractions
        Share of the rows for each split, by name. The shares add up to 1 or less; the rest is in no split.
    groups
        Integer (n_rows,), such as codes of donors: all rows of a group are in the same split. Rows of
        code -1, whose group is not known, are in no split.
    strata
        Integer (n_rows,), such as codes of cell types: each split gets its share of every code. Together with
        `groups`, the shares are as equal as whole groups allow.
    seed
        Non-negative seed.

    Returns
    -------
    dict of str to numpy.ndarray
        int64 row numbers of each split, ascending.

    Raises
    ------
    ValueError
        Fractions are not positive or add up to more than 1, arrays have another length, or there are fewer
        groups than splits.
    TypeError
        Fractions are not a mapping.
    """
    if not isinstance(fractions, Mapping):
        raise TypeError(
            f"fractions must be a mapping of names to shares, such as {{'train': 0.8, 'val': 0.2}}, got a "
            f"{type(fractions).__name__}"
        )
    names = list(fractions)
    shares = np.array([fractions[name] for name in names], np.float64)
    total = float(shares.sum())
    if not names or not (shares > 0).all() or total > 1 + 1e-9:
        raise ValueError(
            f"fractions must be positive and add up to 1 or less, got {dict(fractions)}, which adds up to "
            f"{total:g}"
        )
    rng = np.random.default_rng(at_least("seed", seed, 0))
    stratum = _codes("strata", strata, n_rows)
    if groups is None:
        split = _by_rows(shares, stratum, rng)
    else:
        split = _by_groups(names, shares, _codes("groups", groups, n_rows), stratum, rng)
    return {name: np.flatnonzero(split == k) for k, name in enumerate(names)}


def _codes(name: str, codes: ArrayLike | None, n_rows: int) -> np.ndarray:
    if codes is None:
        return np.zeros(n_rows, np.int64)
    found = integers(name, codes).astype(np.int64)
    if len(found) != n_rows:
        raise ValueError(f"{name} must have {n_rows} entries, one for each row, got {len(found)}")
    return found


def _by_rows(shares: np.ndarray, stratum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of the split of each row, -1 for none."""
    codes, counts = number(stratum)
    order = np.lexsort((rng.random(len(codes)), codes))
    # Rounding cumulated counts keeps each stratum within one row of its share, and all rows together too.
    ends = np.cumsum(counts)
    cuts = np.rint(np.outer(ends, np.cumsum(shares))).astype(np.int64)
    upper = np.diff(cuts, axis=0, prepend=0)
    # Where rounding ends a split after the next one, which happens in small strata, it ends with that one.
    # The last end stays, so the number of rows in all splits together does too.
    upper = np.minimum.accumulate(upper[:, ::-1], axis=1)[:, ::-1]
    upper = np.minimum(upper, counts[:, None])
    place = np.arange(len(codes)) - np.repeat(ends - counts, counts)
    chosen = (place[:, None] >= upper[codes[order]]).sum(axis=1)
    split = np.empty(len(codes), np.int64)
    split[order] = np.where(chosen < len(shares), chosen, -1)
    return split


def _by_groups(
    names: list[str], shares: np.ndarray, group: np.ndarray, stratum: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Like :func:`_by_rows`, with whole groups: the largest group first, each to where most is lacking."""
    split = np.full(len(group), -1, np.int64)
    known = group >= 0
    codes, sizes = number(group[known])
    strata, stratum_sizes = number(stratum[known])
    if len(sizes) < len(names):
        raise ValueError(
            f"{len(sizes)} groups cannot be shared among {len(names)} splits ({', '.join(names)}): each "
            "needs a group of its own"
        )
    table = np.zeros((len(sizes), len(stratum_sizes)))
    np.add.at(table, (codes, strata), 1.0)
    weights = 1.0 / stratum_sizes
    rest = max(0.0, 1.0 - float(shares.sum()))
    targets = np.outer(np.append(shares, rest), stratum_sizes)
    chosen = np.full(len(sizes), -1, np.int64)
    filled = np.zeros_like(targets)
    options = len(shares) + (rest > 1e-9)
    for g in np.lexsort((rng.random(len(sizes)), -sizes)).tolist():
        # How much the sum of squared differences to the targets shrinks, stratum by stratum.
        gain = (weights * table[g] * (2 * (targets - filled)[:options] - table[g])).sum(axis=1)
        chosen[g] = int(np.argmax(gain))
        filled[chosen[g]] += table[g]
    for k in range(len(shares)):
        if not (chosen == k).any():
            held = np.bincount(chosen, minlength=options)
            donors = np.flatnonzero(chosen == int(np.argmax(held)))
            chosen[donors[int(np.argmin(sizes[donors]))]] = k
    split[known] = np.where(chosen < len(shares), chosen, -1)[codes]
    return split
