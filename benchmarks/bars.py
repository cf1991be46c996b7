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
_ROW = re.compile(
    r"^(?P<loader>.+?) {2,}(?P<order>random rows|shuffled stream) +(?P<rate>[\d,]+) "
    r".*?(?P<start>[\d.]+)(?: \(\d+\))?$"
)


@dataclass(frozen=True)
class Bar:
    """A row of a comparison.

    Attributes
    ----------
    loader, order
        The loader, and the order in which it delivers rows.
    rate
        Cells per second when steady, in batches of 512.
    start
        Seconds from making the loader to its 100th batch.
    """

    loader: str
    order: str
    rate: int
    start: float

    @property
    def ours(self) -> bool:
        return self.loader.startswith("hbx_gpu")

    @property
    def name(self) -> str:
        """The loader without the order, which the panel names."""
        return self.loader.removesuffix(", none").removesuffix(", block")


def bars(text: str) -> list[Bar]:
    """The rows of the first table of a result, the fastest loader first.

    Raises
    ------
    ValueError
        The text has no such table.
    """
    table = text.partition("\n\n")[0]
    found = [
        Bar(
            match["loader"].strip(),
            match["order"],
            int(match["rate"].replace(",", "")),
            float(match["start"]),
        )
        for match in map(_ROW.match, table.splitlines())
        if match
    ]
    if not found:
        raise ValueError("expected the table of python -m benchmarks.compare, whose rows name an order")
    return sorted(found, key=lambda bar: -bar.rate)


def draw(found: Sequence[Bar], title: str, target: Path) -> None:
    """Write the picture: a panel per order, and one of seconds to the 100th batch; the best come first."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "hbx_gpu"  # the same table gives the same file
    import matplotlib.pyplot as plt

    panels = []
    for order in dict.fromkeys(bar.order for bar in found):
        part = [bar for bar in found if bar.order == order]
        panels.append((f"{order}: cells per second", part, [float(bar.rate) for bar in part], "{:,.0f}"))
    # The order in which other loaders are at their best.
    early = sorted((bar for bar in found if bar.order == "shuffled stream"), key=lambda bar: bar.start)
    told = "shuffled stream: seconds until 100 batches have come (shorter is better)"
    panels.append((told, early, [bar.start for bar in early], "{:.1f}"))
    n_bars = sum(len(part) for _, part, _, _ in panels)
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8, 0.26 * n_bars + 0.6 * len(panels) + 0.4),
        gridspec_kw={"height_ratios": [len(part) for _, part, _, _ in panels]},
        squeeze=False,
        layout="constrained",
    )
    for axis, (heading, part, values, form) in zip(axes[:, 0], panels, strict=True):
        colors = [OURS if bar.ours else THEIRS for bar in part]
        drawn = axis.barh([bar.name for bar in part], values, color=colors)
        axis.bar_label(drawn, [form.format(value) for value in values], padding=4, fontsize=9)
        axis.invert_yaxis()
        axis.set_title(heading, loc="left", fontsize=10)
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
    parser.add_argument("--title", default="batches of 512 sparse rows of the same 20,000 cells")
    options = parser.parse_args(argv)
    draw(bars(options.result.read_text()), options.title, options.picture)
    print(f"written: {options.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
