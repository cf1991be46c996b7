"""Where the time of a batch goes: ``python -m benchmarks.stages cells | planning``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.commands import dispatch

QUESTIONS = {
    "cells": "How many microseconds per cell does each stage take: plan, read, decode, make dense?",
    "planning": "What does it cost to plan a batch, as an atlas gets more datasets?",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of them; returns the exit status."""
    return dispatch("benchmarks.stages", QUESTIONS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
