"""How far a conversion is: what is called meanwhile, the bar that a terminal shows, and notes beside it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

Progress = Callable[[int, int], object]
"""Called with what is done and its total."""


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""
    del done, total


def checked(progress: Progress | None) -> Progress:
    """`progress`, or :func:`silent` for None.

    Raises
    ------
    TypeError
        It cannot be called.
    """
    if progress is None:
        return silent
    if not callable(progress):
        raise TypeError(
            "progress must be a function that is called with two numbers, what is done and the total, or "
            f"None; got {progress!r}"
        )
    return progress


@contextmanager
def bar(unit: str, title: str | None = None) -> Iterator[Progress]:
    """A progress bar on stderr, as long as the context lasts. It begins when there is something to show."""
    from tqdm import tqdm

    shown: tqdm[NoReturn] | None = None

    def show(done: int, total: int) -> None:
        nonlocal shown
        if not total:
            return
        if shown is None:
            shown = tqdm(
                desc=title, unit=unit, unit_scale=True, total=total, file=sys.stderr, mininterval=0.2
            )
        shown.total = total
        shown.update(done - shown.n)

    try:
        yield show
    finally:
        if shown is not None:
            shown.close()


def line(text: str) -> None:
    """Print a line on stdout. A bar that is shown on stderr makes room for it and follows below."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def note(text: str) -> None:
    """Print a line on stderr. A bar that is shown there makes room for it and follows below."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


class NoteHandler(logging.Handler):
    """Prints log records by way of :func:`note`."""

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        try:
            note(self.format(record))
        except Exception:
            self.handleError(record)
