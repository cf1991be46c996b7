"""`hbx-gpu bench`, and beside it what other loaders bring to the GPU: ``python -m benchmarks.end_to_end``.

Peers deliver on the CPU and their batches are moved to the device, as their users do it. They run in
interpreters of their own (``--python NAME=PATH``, with a CUDA build of torch); who cannot is skipped with its
reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.compare import PEERS, Contender, PeerFailure
from hbx_gpu._bench import report
from hbx_gpu._bench.runs import Options, run
from hbx_gpu._bench.tables import spread, table, write_json
from hbx_gpu._devices import resolve
from hbx_gpu.errors import DeviceUnavailableError

_PEERS = ("annbatch", "homeobox", "scdl")


def peers(options: argparse.Namespace, data: Any, device: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Cells/s of every variant that runs, and why the others do not."""
    from tqdm import tqdm

    found, failures = [], {}
    contenders = [Contender(PEERS[name], key) for name in options.peers for key in PEERS[name].variants]
    for contender in tqdm(contenders, desc="peers", unit="variant"):
        try:
            if contender.peer.name in failures:
                continue
            compare.prepare(options, contender.peer, data)
            work = compare.work_folder(options, contender.peer, data)
            measure = [
                "measure",
                *("--source", data.h5ad, "--work", work, "--truth", data.truth),
                *("--variant", contender.key, "--layout", "dense", "csr", "--seed", options.seed),
                *("--batch-size", options.batch, "--seconds", options.seconds, "--to", device),
            ]
            answers: list[dict[str, Any]] = []
            for _ in range(options.repeat):
                answers += compare.ask(options, contender.peer, *measure)
        except PeerFailure as failure:
            failures[contender.peer.name] = str(failure)
            continue
        for layout in ("dense", "csr"):
            mine = [answer for answer in answers if answer["layout"] == layout]
            found.append(
                {
                    "peer": contender.name,
                    "label": contender.variant.label,
                    "order": contender.variant.order,
                    "layout": layout,
                    "wrong_rows": sum(answer.get("wrong_rows", 0) for answer in mine),
                    **spread([answer["cells_per_s"] for answer in mine]),
                }
            )
    return found, failures


def described(found: Sequence[dict[str, Any]], failures: dict[str, str], device: str) -> str:
    """Peers as a table, and those that are not in it."""
    rows = [
        (
            f"{one['label']}, {one['layout']}, {one['order']}",
            f"{one['median']:,.0f}",
            f"{one['min']:,.0f} .. {one['max']:,.0f}",
            "ok" if not one["wrong_rows"] else f"{one['wrong_rows']} WRONG",
        )
        for one in found
    ]
    parts = [table((f"peers, then to {device}", "cells/s", "range", "rows"), rows)] if rows else []
    return "\n".join([*parts, *(f"{name} skipped: {reason}" for name, reason in failures.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 1 for wrong values, 2 without the device."""
    options = _parse(argv)
    try:
        gpu = resolve(options.device)
    except DeviceUnavailableError as missing:
        print(missing)
        return 2
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    data, what = compare.generate(options)
    compare.prepare(options, PEERS["ours"], data)
    residencies = ("none",) if gpu is None else ("none", "host", "device")
    ours = run(
        Options(
            path=compare.work_folder(options, PEERS["ours"], data) / "atlas",
            device=device,
            batches=(options.batch,),
            residencies=residencies,
            seconds=options.seconds,
            repeat=options.repeat,
            seed=options.seed,
            models=options.train,
        )
    )
    found, failures = peers(options, data, device)
    text = "\n\n".join((report.text(ours), described(found, failures, device), what))
    print(text)
    report.write(ours, options.out)
    (options.out / "end_to_end.txt").write_text(text + "\n")
    everything = {"data": what, "ours": report.content(ours), "peers": found, "skipped": failures}
    write_json(options.out / "end_to_end.json", everything)
    return int(ours.wrong > 0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N; cpu to try the command")
    parser.add_argument("--data", default="A", help="A, B, or an .h5ad file")
    parser.add_argument("--cells", type=int, help="default: 100,000; of a file: all")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--groups", type=int, default=4, help="datasets in the atlas")
    parser.add_argument("--codec", help="of the atlas (default: that of new ones)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", nargs="*", default=list(_PEERS), choices=[n for n in PEERS if n != "ours"])
    parser.add_argument(
        "--python", nargs=1, action="extend", default=[], metavar="NAME=PATH", help="a peer's interpreter"
    )
    parser.add_argument("--train", nargs="*", default=["mlp", "transformer"], choices=("mlp", "transformer"))
    parser.add_argument("--work", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/gpu"))
    parser.add_argument("--fresh", action="store_true", help="convert the data anew")
    parser.set_defaults(gene_orders="mixed")
    options = parser.parse_args(argv)
    options.python = dict(entry.split("=", 1) for entry in options.python)
    options.cells_given = options.cells
    options.cells = options.cells or 100_000
    return options


if __name__ == "__main__":
    raise SystemExit(main())
