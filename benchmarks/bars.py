"""A bar for each loader of a comparison: ``python -m benchmarks.bars RESULT.txt PICTURE.svg``.

The picture is drawn from the committed table, so that it shows nothing that the table does not say.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS, THEIRS = "#2f7ebc", "#9a9a9a"
_ROW = re.compile(r"^(?P<loader>.+?) {2,}(?P<order>random rows|shuffled stream) +(?P<rate>[\d,]+) ")


@dataclass(frozen=True)
class Bar:
    """A loader, the order in which it delivers rows, and its cells per second at the smallest batch size."""

    loader: str
    order: str
    rate: int

    @property
    def ours(self) -> bool:
        return self.loader.startswith("hbx_gpu")


def bars(text: str) -> list[Bar]:
    """The rows of the first table of a result, the fastest loader first.

    Raises
    ------
    ValueError
        The text has no such table.
    """
    table = text.partition("\n\n")[0]
    found = [
        Bar(match["loader"].strip(), match["order"], int(match["rate"].replace(",", "")))
        for match in map(_ROW.match, table.splitlines())
        if match
    ]
    if not found:
        raise ValueError("expected the table of python -m benchmarks.compare, whose rows name an order")
    return sorted(found, key=lambda bar: -bar.rate)


def draw(found: Sequence[Bar], title: str, target: Path) -> None:
    """Write the picture: a panel per order, its longest bar first."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "hbx_gpu"  # the same table gives the same file
    import matplotlib.pyplot as plt

    orders = list(dict.fromkeys(bar.order for bar in found))
    parts = [[bar for bar in found if bar.order == order] for order in orders]
    figure, axes = plt.subplots(
        len(parts),
        figsize=(8, 0.3 * len(found) + 0.8 * len(parts) + 0.4),
        gridspec_kw={"height_ratios": [len(part) for part in parts]},
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, part, order in zip(axes[:, 0], parts, orders, strict=True):
        names = [bar.loader for bar in part]
        drawn = axis.barh(
            names, [bar.rate for bar in part], color=[OURS if bar.ours else THEIRS for bar in part]
        )
        axis.bar_label(drawn, [f"{bar.rate:,}" for bar in part], padding=4, fontsize=9)
        axis.invert_yaxis()
        axis.set_title(order, loc="left", fontsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="both", length=0, labelsize=9)
        axis.set_xticks([])
        axis.margins(x=0.12)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="table written by python -m benchmarks.compare")
    parser.add_argument("picture", type=Path, help=".svg or .png to write")
    parser.add_argument("--title", default="cells per second, CSR batches of 512")
    options = parser.parse_args(argv)
    draw(bars(options.result.read_text()), options.title, options.picture)
    print(f"written: {options.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
