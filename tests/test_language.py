"""The language of messages, docstrings and pages: phrases that a reader stumbles over do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STUMBLES = {
    r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b|other\b|way\b|such\b)\{?[a-z]": "write 'is not a ...'",
    r"\bsay [a-z_]+=": "write 'pass name='",
    r"\bbehind\b(?! the scenes)": "write 'after'",
    r"as at the begin\b": "write 'as at the beginning'",
    r"\ba own\b": "write 'its own'",
}


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts that a module raises, with what is filled in written as {}."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        for part in ast.walk(node.exc):
            if isinstance(part, ast.JoinedStr):
                pieces = (v.value if isinstance(v, ast.Constant) else "{}" for v in part.values)
                yield part.lineno, "".join(map(str, pieces))
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


@pytest.mark.parametrize("phrase", STUMBLES)
def test_messages_are_plain(phrase: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in sorted((ROOT / "hbx_gpu").rglob("*.py"))
        for line, text in messages(ast.parse(file.read_text(encoding="utf-8")))
        if re.search(phrase, text)
    ]
    assert not found, f"{STUMBLES[phrase]}:\n" + "\n".join(found)


def test_a_message_that_stumbles_is_found() -> None:
    code = "raise ValueError(f'{path} is no archive; say layout=, behind {n}')"
    ((_, text), *_) = messages(ast.parse(code))
    assert [bool(re.search(phrase, text)) for phrase in STUMBLES] == [True, True, True, False, False]
