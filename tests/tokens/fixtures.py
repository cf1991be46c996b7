"""Inputs and outputs of the real packages, and how rows are compared up to the order of equal values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tests import npz

ENGINES = ("host", "reference", "device")
SIZES = ("small", "deep")


@dataclass(frozen=True)
class Tokens:
    """The folder of token fixtures, one size of it."""

    folder: Path
    size: str

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.load("inputs")

    def load(self, model: str, suffix: str = "") -> dict[str, np.ndarray]:
        return npz.load(self.folder / model / f"{self.size}{suffix}.npz")

    @cached_property
    def counts(self) -> csr_matrix:
        z = self.inputs
        return csr_matrix((z["data"], z["indices"].astype(np.int32), z["indptr"]), shape=tuple(z["shape"]))

    @cached_property
    def genes(self) -> list[str]:
        return [str(gene) for gene in self.inputs["genes"]]

    def vocabulary(self, token: np.ndarray, **specials: int) -> dict[str, int]:
        """Gene -> id for genes with one, and special tokens."""
        found = {gene: int(number) for gene, number in zip(self.genes, token, strict=True) if number >= 0}
        return {**found, **specials}

    def table(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.genes, values.tolist(), strict=True))

    def rows(self, numbers: np.ndarray | slice = slice(None)) -> csr_matrix:
        return self.counts[numbers]


def ragged(flat: np.ndarray, pointers: np.ndarray) -> list[np.ndarray]:
    return [flat[a:b] for a, b in pairwise(pointers)]


def unpadded(batch: dict[str, Any], name: str = "input_ids") -> list[np.ndarray]:
    return [row[:n] for row, n in zip(batch[name], batch["lengths"], strict=True)]


def equal_up_to_ties(ours: np.ndarray, theirs: np.ndarray, value: dict[int, float]) -> bool:
    """Whether rows of ids hold the same values in place and, ties at the cut aside, the same ids."""
    if len(ours) != len(theirs) or len(set(ours.tolist())) != len(ours):
        return False
    a, b = ([value[int(i)] for i in ids] for ids in (ours, theirs))
    if a != b:
        return False
    last = a[-1] if a else None
    return {i for i, v in zip(ours.tolist(), a, strict=True) if v != last} == {
        i for i, v in zip(theirs.tolist(), b, strict=True) if v != last
    }
