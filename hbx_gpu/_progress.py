"""How far a conversion is: what is called meanwhile, and the bar that a terminal shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object]
"""Called with what is done and its total."""


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""
    del done, total


@contextmanager
def bar(unit: str, title: str | None = None) -> Iterator[Progress]:
    """A progress bar on stderr, as long as the context lasts."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, unit_scale=True, file=sys.stderr, mininterval=0.2) as shown:

        def show(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield show
