"""Fenced blocks of the documentation pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    for match in FENCE.finditer(page.read_text()):
        yield match[1], match[2]
