"""The subcommand `hbx-gpu doctor`: what this machine has for a loader, and what to install."""

from __future__ import annotations

import argparse


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="show what hardware and packages this machine has, and what to install",
        description="Show processor, memory, GPUs, driver and packages, what device=, executor=, io= and "
        "decode= choose by themselves, and what is missing or does not fit together. The exit status is 1 "
        "if something does not fit together.",
    )
    parser.set_defaults(command=run, if_interrupted="nothing was changed")


def run(_args: argparse.Namespace) -> int:
    """Print the report; 1 if there is something to mend."""
    from hbx_gpu._doctor.diagnosis import problems, report
    from hbx_gpu._doctor.facts import look

    facts = look()
    print(report(facts))
    return int(bool(problems(facts)))
