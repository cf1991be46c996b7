"""Published packages beside our tokens: the same cells, output compared, processor time of both."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbx_gpu import SparseBatch
from hbx_gpu.tokens import Recipe, compile, encode, geneformer_v2, scgpt, tahoe_x1, transcriptformer  # noqa: A004

Arrays = dict[str, np.ndarray]
SCRIPT = Path(__file__).with_name("token_references.py")
ROUNDS = 5
_SPECIALS = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


@dataclass(frozen=True, slots=True)
class Peer:
    """How a package's output is compared.

    Attributes
    ----------
    compared
        Recipes that make what the package makes without sampling.
    timed
        The recipe that is timed, sampling and masks included as the package does them.
    differs
        What differs between the package's arrays and ours, in words; empty if nothing does.
    equality
        What is equal, in words.
    """

    compared: Callable[[dict[str, int], dict[str, float]], Sequence[Recipe]]
    timed: Callable[[dict[str, int], dict[str, float]], Recipe]
    differs: Callable[[Arrays, Sequence[Arrays]], str]
    equality: str


def _same(*names: str) -> Callable[[Arrays, Sequence[Arrays]], str]:
    def differs(theirs: Arrays, ours: Sequence[Arrays]) -> str:
        for name in names:
            a, b = theirs[name], ours[0][name]
            width = min(a.shape[1], b.shape[1])
            odd = int((a[:, :width] != b[:, :width]).any(axis=1).sum())
            if odd or a[:, width:].any() or b[:, width:].any():
                return f"{name}: {odd} of {len(a)} rows"
        return ""

    return differs


def _scgpt_differs(theirs: Arrays, ours: Sequence[Arrays]) -> str:
    """Ids are equal, and each random bin lies where it can: above the lower edge count, up to the higher."""
    highest, lowest = ours
    if not np.array_equal(theirs["input_ids"], highest["input_ids"]):
        return "input_ids"
    bins, genes = theirs["values"], highest["values"] > 0
    outside = (bins > highest["values"]) | (bins < np.minimum(lowest["values"], highest["values"]))
    return f"values: {int((outside & genes).sum())} bins" if (outside & genes).any() else ""


def _plain_bins(words: dict[str, int], **options: object) -> Recipe:
    return scgpt(words, sampling=False, **options)  # type: ignore[arg-type]


PEERS: dict[str, Peer] = {
    "transcriptformer": Peer(
        lambda words, medians: [transcriptformer(words, pad="<pad>")],  # noqa: ARG005
        lambda words, medians: transcriptformer(words, pad="<pad>", order="random"),  # noqa: ARG005
        _same("input_ids", "values"),
        "ids and counts, bit for bit",
    ),
    "scgpt": Peer(
        lambda words, medians: [  # noqa: ARG005
            _plain_bins(words, side="one"),
            _plain_bins(words, side="left"),
        ],
        lambda words, medians: scgpt(words, side="both", mask=0.4),  # noqa: ARG005
        _scgpt_differs,
        "ids; every random bin within its bounds",
    ),
    "tahoe-x1": Peer(
        lambda words, medians: [tahoe_x1(words, sampling=False, keep_counts=True)],  # noqa: ARG005
        lambda words, medians: tahoe_x1(words),  # noqa: ARG005
        _same("input_ids", "values"),
        "ids and bins, bit for bit",
    ),
    "helical": Peer(
        lambda words, medians: [geneformer_v2(words, medians)],
        geneformer_v2,
        _same("input_ids"),
        "ids, bit for bit",
    ),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """One package beside ours.

    Attributes
    ----------
    version
        Of the package.
    theirs, ours
        Cells per second of processor time.
    differs
        See :class:`Peer`.
    """

    package: str
    version: str
    theirs: float
    ours: float
    differs: str

    @property
    def line(self) -> tuple[str, ...]:
        """For a table."""
        equal = self.differs or PEERS[self.package].equality
        return (
            f"{self.package} {self.version}", f"{self.theirs:,.0f}", f"{self.ours:,.0f}",
            f"{self.ours / self.theirs:.0f}x", ("DIFFERENT: " if self.differs else "equal: ") + equal,
        )  # fmt: skip


def compare(package: str, interpreter: str, rows: SparseBatch, genes: Sequence[str]) -> Compared:
    """Run a package's own code on `rows` in its interpreter, and our recipe on them here.

    Raises
    ------
    RuntimeError
        The interpreter cannot import the package, or its code failed; the message has the end of its output.
    """
    token = np.arange(len(genes)) + 16
    # No two genes of a cell have the same value, so that no order is left open.
    medians = np.random.default_rng(0).lognormal(1.0, 0.7, len(genes))
    words = dict(zip(genes, token.tolist(), strict=True)) | _SPECIALS
    scales = dict(zip(genes, medians.tolist(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "cells.npz", Path(folder) / "tokens.npz"
        np.savez(
            source, indptr=rows.offsets, indices=rows.indices, data=rows.values.astype(np.float64),
            genes=np.array(genes), token=token, medians=medians,
        )  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [interpreter, "-I", str(SCRIPT), package, str(source), str(target)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{package} in {interpreter} failed:\n{done.stderr[-2000:]}")
        with np.load(target) as file:
            theirs = dict(file)
    peer = PEERS[package]
    ours = [encode(rows, recipe, genes) for recipe in peer.compared(words, scales)]
    compiled = compile(peer.timed(words, scales), genes)
    seconds = []
    for _ in range(ROUNDS + 1):
        begin = time.process_time()
        encode(rows, compiled)
        seconds.append(time.process_time() - begin)
    return Compared(
        package, str(theirs["version"]), len(rows) / float(theirs["seconds"]), len(rows) / min(seconds[1:]),
        peer.differs(theirs, ours),
    )  # fmt: skip
