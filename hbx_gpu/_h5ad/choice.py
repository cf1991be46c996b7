"""Which matrix of a file is taken where nobody names one: the same in every command, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hbx_gpu._h5ad.evidence import Evidence, look_at
from hbx_gpu._h5ad.matrix import Matrix

# Layers that hold counts by their names, beside X and raw.
_COUNT_LAYERS = ("counts", "raw_counts", "count", "raw")


@dataclass(frozen=True)
class MatrixChoice:
    """The matrix that was chosen.

    Attributes
    ----------
    name
        ``X``, ``raw`` or a layer.
    reason
        What it holds, and why it was not ``X``, in words.
    evidence
        What its values look like.
    """

    name: str
    reason: str
    evidence: Evidence

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_matrix(available: Sequence[str], read: Callable[[str], Matrix]) -> MatrixChoice:
    """Choose the matrix that holds counts: ``X`` if it does, else ``raw``, else a layer called ``counts``.

    Where none of them does it is ``X``, so that whoever needs counts can say what was found there.

    Parameters
    ----------
    available
        Matrices of the file, at least one.
    read
        Opens one of them.
    """
    layers = [name for name in _COUNT_LAYERS if name in available and name != "raw"]
    order = [name for name in ("X", "raw", *layers) if name in available] or list(available[:1])
    seen: dict[str, Evidence] = {}
    for name in order:
        seen[name] = look_at(read(name))
        if seen[name].are_counts:
            others = [f"{other} holds {seen[other]}" for other in order[: order.index(name)]]
            return MatrixChoice(name, "; ".join(["counts", *others]), seen[name])
    first = order[0]
    return MatrixChoice(first, str(seen[first]), seen[first])
