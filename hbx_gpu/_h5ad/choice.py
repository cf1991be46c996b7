"""Chooses the matrix of a file when the user names none, by one rule for all commands, and reports it."""

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
        Sentence that says what the matrix holds and, if it is not ``X``, why.
    evidence
        Evidence about the kind of its values.
    """

    name: str
    reason: str
    evidence: Evidence

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_matrix(available: Sequence[str], read: Callable[[str], Matrix]) -> MatrixChoice:
    """Choose the matrix that holds counts: ``X`` if it does, else ``raw``, else a layer called ``counts``.

    If none of them does, ``X`` is chosen, so that callers that need counts can report what ``X`` holds.

    Parameters
    ----------
    available
        Matrices of the file, at least one.
    read
        Function that opens a matrix by name.
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
