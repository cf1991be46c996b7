"""The option ``--allow-links`` of the commands that open atlases, archives and other stores."""

from __future__ import annotations

import argparse

FLAGS = {"allow_links": "--allow-links"}
"""Name of the Python parameter -> the option, for `hbx_gpu._advice.from_command`."""


def add_allow_links(parser: argparse.ArgumentParser) -> None:
    """Add the option to the parser of a command."""
    parser.add_argument(
        "--allow-links",
        action="store_true",
        help="follow links that lead out of a store or a file; only where you made these links",
    )
