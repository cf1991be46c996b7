"""SCDL archives, here and in bionemo-scdl: ``python -m benchmarks.scdl rows | convert | profile``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.commands import dispatch

QUESTIONS = {
    "rows": "How many rows per second become CSR batches, and are they the archive's?",
    "convert": "How long does a .h5ad file take to become an archive, and how much memory?",
    "profile": "What does loading any archive or .h5ad file cost: opening, cells per second, memory, disk?",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of them; returns the exit status."""
    return dispatch("benchmarks.scdl", QUESTIONS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
