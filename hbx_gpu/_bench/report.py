"""A run as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hbx_gpu._bench import machine
from hbx_gpu._bench.runs import NOISE, Report
from hbx_gpu._bench.tables import table, write_json


def text(report: Report) -> str:
    """Return the report as text for people."""
    parts = [_loading(report)]
    if report.trained:
        parts.append(_training(report))
    parts += [f"not measured: {reason}" for reason in report.skipped]
    checked = sum(result.checked for result in report.results)
    verdict = "all equal" if not report.wrong else f"{report.wrong} WRONG"
    parts.append(f"{checked:,} rows of sampled batches compared with the NumPy engine: {verdict}")
    parts.append(_conditions(report))
    return "\n\n".join(parts)


def _loading(report: Report) -> str:
    rows = [
        (
            result.setting.describe(),
            f"{result.median:,.0f}{' ~' if result.is_noisy else ''}",
            f"{min(result.rates):,.0f} .. {max(result.rates):,.0f}",
            f"{result.limit:,.0f}",
            f"{result.median / result.limit:.0%}",
            "ok" if not result.wrong else f"{result.wrong} of {result.checked} WRONG",
        )
        for result in report.results
    ]
    legend = [
        "cells/s: median of the repeats, range: slowest and fastest of them",
        "limit: what memory and link of this machine allow (below), of limit: cells/s as a share of it",
        "rows: whether sampled rows equal those of the NumPy engine",
    ]
    if any(result.is_noisy for result in report.results):
        legend.append(f"~: the repeats differ by more than {NOISE:.0%}, so other work used the machine")
    return "\n".join([table(("loading", "cells/s", "range", "limit", "of limit", "rows"), rows), *legend])


def _training(report: Report) -> str:
    rows = [
        (
            one.model,
            f"{one.cells_per_s:,.0f}",
            f"{1e3 * one.step_seconds:,.1f} ms",
            f"{one.waiting:.1%}",
            f"{one.slowdown:.0%}",
            f"{one.first_loss:.3g} .. {one.last_loss:.3g}",
        )
        for one in report.trained
    ]
    header = ("training while loading", "cells/s", "step alone", "waits for data", "slowed down by", "loss")
    legend = (
        "step alone: a training step on a batch that is there already; waits for data: share of the time\n"
        "slowed down by: how much longer a step takes while the loader works; loss: first and last batch"
    )
    return f"{table(header, rows)}\n{legend}"


def _conditions(report: Report) -> str:
    speed, sizes = report.bandwidth, report.bytes_per_cell
    rates = f"fill {speed.fill / 1e9:.1f} GB/s, copy {speed.copy / 1e9:.1f} GB/s"
    if speed.link is not None:
        rates += f", link {speed.link / 1e9:.1f} GB/s"
    return "\n".join(
        (
            f"{report.what}; {sizes.values:,.0f} values and {sizes.stored:,.0f} stored bytes per cell",
            f"limit: every stored byte crosses once, every byte made is written once, at {rates}, "
            "measured in this process",
            machine.describe(report.conditions),
        )
    )


def content(report: Report) -> dict[str, object]:
    """Return the report as plain values for JSON."""
    return {
        "what": report.what,
        "conditions": report.conditions,
        "bandwidth": asdict(report.bandwidth),
        "bytes_per_cell": asdict(report.bytes_per_cell),
        "results": [
            {
                **asdict(result.setting),
                "cells_per_s": result.median,
                "runs": result.rates,
                "limit_cells_per_s": result.limit,
                "checked_rows": result.checked,
                "wrong_rows": result.wrong,
                "stats": result.stats.as_dict(),
            }
            for result in report.results
        ],
        "training": [asdict(one) for one in report.trained],
        "not_measured": report.skipped,
    }


def write(report: Report, folder: Path) -> list[Path]:
    """Write table, JSON and, where matplotlib is installed, the picture; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "bench.txt", folder / "bench.json"]
    files[0].write_text(text(report) + "\n")
    write_json(files[1], content(report))
    if report.results and draw(report, folder / "bench.png"):
        files.append(folder / "bench.png")
    return files


def draw(report: Report, path: Path) -> bool:
    """Rates as bars with their limits as marks, on a logarithmic axis; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    found = list(reversed(report.results))
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.32 * len(found)), layout="constrained")
    places = range(len(found))
    axis.barh(
        places,
        [r.median for r in found],
        color="#1f5f8f",
        height=0.7,
        label="measured: median, with the range of the repeats as a line",
    )
    for place, result in zip(places, found, strict=True):
        axis.plot([min(result.rates), max(result.rates)], [place, place], color="#333333", linewidth=1)
    axis.plot(
        [r.limit for r in found],
        places,
        "|",
        color="#c2571a",
        markersize=12,
        label="limit: what memory and link allow",
    )
    axis.set_yticks(places, [r.setting.describe() for r in found], fontsize=8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("cells/s")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    where = report.conditions["gpu"] or f"{report.conditions['cpu']}, {report.conditions['cores']} cores"
    axis.set_title(where, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
