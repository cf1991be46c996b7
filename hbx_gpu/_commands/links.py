"""The option ``--allow-links`` of the commands that open an atlas."""

from __future__ import annotations

import argparse

FLAGS = {"allow_links": "--allow-links"}
"""Name of the Python parameter -> the option, for `hbx_gpu._advice.from_command`."""


def add_allow_links(parser: argparse.ArgumentParser) -> None:
    """Add the option to the parser of a command."""
    parser.add_argument(
        "--allow-links",
        action="store_true",
        help="follow links that lead out of the atlas; only for an atlas whose links you made",
    )
