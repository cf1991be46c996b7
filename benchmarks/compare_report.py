"""The comparison's results as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table

_ORDERS = {"random": "random rows", "stream": "shuffled stream", "floor": "floor"}
# A color per peer; variants of a peer differ in line and marker.
_COLORS = {
    "ours": "#1f5f8f",
    "in_place": "#4aa3c7",
    "homeobox": "#c2571a",
    "annbatch": "#3c8d53",
    "scdl": "#8a63a8",
    "scdataset": "#b8860b",
    "slaf": "#c7417b",
    "annloader": "#7a5c44",
    "memory": "#8c8c8c",
}
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def report(content: Mapping[str, Any]) -> str:
    """Tables of all results, and the conditions they hold under."""
    layouts = list(dict.fromkeys(r["layout"] for r in content["results"]))
    parts = [_rates(content, layout) for layout in layouts]
    parts += [_per_cpu(content, layout) for layout in layouts]
    parts += [_facts(content), _conditions(content)]
    return "\n\n".join(parts)


def _rate(result: Mapping[str, Any]) -> str:
    found = result["cells_per_s"]
    late = "" if result["steady"] else " *"
    return f"{found['median']:,.0f} ({found['min']:,.0f} .. {found['max']:,.0f}){late}"


def _start(result: Mapping[str, Any]) -> str:
    """Seconds to the first 100 batches, or how many there were in the time."""
    if "first_batches_s" not in result:
        return "-"
    n = int(result["first_batches"]["median"])
    return f"{result['first_batches_s']['median']:.2f}" + ("" if n == 100 else f" ({n})")


def _rates(content: Mapping[str, Any], layout: str) -> str:
    results = {(r["contender"], r["batch"]): r for r in content["results"] if r["layout"] == layout}
    batches = sorted({batch for _, batch in results})
    order = {key: k for k, key in enumerate(_ORDERS)}
    contenders = content["contenders"]
    names = sorted(
        {name for name, _ in results},
        key=lambda name: (
            order[contenders[name]["order"]],
            -max(results[name, b]["cells_per_s"]["median"] for b in batches if (name, b) in results),
        ),
    )
    rows = [
        (
            contenders[name]["label"],
            _ORDERS[contenders[name]["order"]],
            *(_rate(results[name, b]) if (name, b) in results else "-" for b in batches),
            *(_start(results[name, b]) if (name, b) in results else "-" for b in batches),
        )
        for name in names
    ]
    what = {"csr": "CSR", "dense": "dense float32"}[layout]
    header = ("loader", "order", *(f"batch {b:,}" for b in batches), *(f"100 x {b:,}, s" for b in batches))
    head = f"cells/s when steady, and seconds to the first 100 batches, {what}, median (range)"
    return f"{head}\n{table(header, rows)}"


def _per_cpu(content: Mapping[str, Any], layout: str) -> str:
    """Cells per second of processor time; a machine that others use changes it less than a rate."""
    results = {(r["contender"], r["batch"]): r for r in content["results"] if r["layout"] == layout}
    results = {key: r for key, r in results.items() if "cells_per_cpu_s" in r}
    batches = sorted({batch for _, batch in results})
    rows = [
        (
            content["contenders"][name]["label"],
            *(f"{results[name, b]['cells_per_cpu_s']['median']:,.0f}" if (name, b) in results else "-"
              for b in batches),
        )
        for name in dict.fromkeys(name for name, _ in results)
    ]  # fmt: skip
    head = f"cells per CPU second when steady, all threads of the process, {layout}, median"
    return f"{head}\n{table(('loader', *(f'batch {b:,}' for b in batches)), rows)}"


def _facts(content: Mapping[str, Any]) -> str:
    """What is known of each loader besides its rate."""
    rows = []
    for name, variant in content["contenders"].items():
        mine = [r for r in content["results"] if r["contender"] == name]
        if not mine:
            continue
        store = content["stores"][name.split(":")[0]]
        found = content["checks"].get(name, {})
        # Later settings of a process find everything imported and compiled.
        first = [r["first_batch_s"]["median"] for r in mine if "first_batch_s" in r]
        memory = {
            layout: max((r["peak_rss"]["median"] for r in mine if r["layout"] == layout), default=None)
            for layout in ("csr", "dense")
        }
        rows.append(
            (
                variant["label"],
                f"{content.get('sizes', {}).get(name, store['bytes']) / content['data']['nnz']:.2f}",
                f"{store['prepare_s']:.0f}",
                f"{first[0]:.2f}",
                *(f"{value / 1e6:,.0f}" if value else "-" for value in memory.values()),
                f"{found['mixing']:.3f}" if "mixing" in found else "-",
                _verdict(found, mine),
            )
        )
    header = ("loader", "bytes/nnz", "convert s", "first batch s", "peak MB csr", "peak MB dense",
              f"mixing @{content['mixing']['batch']}", "rows checked")  # fmt: skip
    return table(header, rows)


def _verdict(found: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "-"
    wrong = sum(r["wrong_rows"] for r in results)
    if found["wrong"] or wrong:
        return f"WRONG: {found['wrong'] + wrong:,}"
    if found.get("missing"):
        return f"{found['missing']:,} of {found['of']:,} never delivered"
    return f"{found['checked']:,} of {found['of']:,}, +{sum(r['checked_rows'] for r in results):,} timed"


def _conditions(content: Mapping[str, Any]) -> str:
    data = content["data"]
    orders = (
        "each with its genes in another order" if data["gene_orders"] == "mixed" else "genes in one order"
    )
    lines = [
        f"data {data['described']}; seed {data['seed']}; {data['groups']} datasets in the atlases, {orders}"
        + (f"; our codec {content['codec']}" if content["codec"] else ""),
        f"page cache {content['cache']}; {content['repeat']} repeats of windows of {content['seconds']:g} s, "
        "until two are within 10 % (*: they never were); 100 batches count from opening (in brackets: how "
        "many there were before time was up); "
        "each loader in a process of its own, CSR before dense, batch sizes ascending, repeats alternating",
        "peak MB includes pages of memory maps and what the process imported, but no worker processes; "
        "first batch counts from opening, after imports",
        f"mixing: label entropy of batches of {content['mixing']['batch']} over that of uniform draws, "
        f"{content['mixing']['labels']} labels in runs of the stored order",
    ]
    for name, store in content["stores"].items():
        versions = ", ".join(f"{package} {version}" for package, version in store["versions"].items())
        lines.append(f"{name}: Python {store['python']}; {versions}")
    lines += [f"{name}: skipped ({reason})" for name, reason in content["skipped"].items()]
    lines.append(describe(content["conditions"]))
    return "\n".join(lines)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Throughput against batch size, and against mixing, one row of panels per layout; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layouts = list(dict.fromkeys(r["layout"] for r in content["results"]))
    figure, axes = plt.subplots(
        len(layouts), 2, figsize=(13.5, 5.2 * len(layouts)), squeeze=False, layout="constrained"
    )
    for (left, right), layout in zip(axes, layouts, strict=True):
        results = [r for r in content["results"] if r["layout"] == layout]
        what = {"csr": "CSR", "dense": "dense float32"}[layout]
        _by_batch(left, content, results)
        left.set_title(f"{what}: throughput by batch size", fontsize=10)
        _by_mixing(right, content, results)
        right.set_title(f"{what}, batch {content['mixing']['batch']}: throughput by mixing", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    found = content["conditions"]
    figure.suptitle(
        f"{content['data']['described']}\n{found['cpu']}, {found['cores']} cores; "
        f"page cache {content['cache']}; median and range of {content['repeat']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    peer = name.split(":")[0]
    siblings = [other for other in content["contenders"] if other.split(":")[0] == peer]
    turn = siblings.index(name) % len(_LINES)
    return {"color": _COLORS.get(peer, "#444444"), "linestyle": _LINES[turn], "marker": _MARKERS[turn]}


def _by_batch(axis: Any, content: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    for name, variant in content["contenders"].items():
        mine = sorted((r["batch"], r["cells_per_s"]) for r in results if r["contender"] == name)
        if not mine:
            continue
        batches = [batch for batch, _ in mine]
        middle = [rate["median"] for _, rate in mine]
        spans = [
            [rate["median"] - rate["min"] for _, rate in mine],
            [rate["max"] - rate["median"] for _, rate in mine],
        ]
        thick = 2.2 if name.startswith("ours") else 1.2
        style = {"linewidth": thick, "markersize": 5, "elinewidth": 1, **_style(content, name)}
        axis.errorbar(batches, middle, spans, label=variant["label"], **style)
    axis.set_xscale("log", base=2)
    _rate_axis(axis)
    sizes = sorted({r["batch"] for r in results})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xlabel("batch size")


def _by_mixing(axis: Any, content: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    batch = content["mixing"]["batch"]
    for r in results:
        found = content["checks"].get(r["contender"], {})
        if r["batch"] != batch or "mixing" not in found:
            continue
        style = {**_style(content, r["contender"]), "linestyle": "none"}
        point = found["mixing"], r["cells_per_s"]["median"]
        axis.plot(*point, markersize=8, **style)
        axis.annotate(content["contenders"][r["contender"]]["label"], point, xytext=(-7, 4), fontsize=7,
                      textcoords="offset points", ha="right")  # fmt: skip
    axis.set_xlim(0, 1.04)
    _rate_axis(axis)
    axis.set_xlabel("mixing: label entropy of batches / that of uniform draws")


def _rate_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_yscale("log")
    axis.set_ylabel("cells/s")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, which="both")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
