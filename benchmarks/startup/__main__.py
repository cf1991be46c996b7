"""What comes before the first batch: ``python -m benchmarks.startup opening | workers``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.commands import dispatch

QUESTIONS = {
    "opening": "What does a large atlas cost before and while it is read, in seconds and in memory?",
    "workers": "What does a spawned worker cost until its first batch?",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of them; returns the exit status."""
    return dispatch("benchmarks.startup", QUESTIONS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
