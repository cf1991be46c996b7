"""The command line of `hbx-gpu bench`. Prints, as commands do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._paths import argument as local_argument


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the command to the parser of `hbx-gpu`."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure how fast this machine loads an atlas, an archive or another store",
        description="Cells per second in every layout, order and executor, beside what memory and link of "
        "this machine allow, checked against a plain decoder; and models that train while loading. "
        "Nothing is written but what --out names.",
    )
    parser.add_argument(
        "path", type=local_argument, metavar="PATH", help="an atlas or any store of hbx_gpu.open"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default)")
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--layout", default=["dense", "csr"], choices=("dense", "csr"), **several)
    parser.add_argument(
        "--dtype",
        default=["float32", "bfloat16"],
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of dense batches (default: float32 bfloat16)",
        **several,
    )
    parser.add_argument(
        "--order",
        default=["random", "stream"],
        choices=("random", "stream", "block", "group"),
        help="of cells: random and stream (stored order) by default; block, group: localities of CellSampler",
        **several,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1024], metavar="N", help="cells per batch")
    parser.add_argument(
        "--residency",
        default=["none"],
        choices=("none", "host", "device", "auto"),
        help="where compressed chunks stay (default: none, streamed)",
        **several,
    )
    parser.add_argument(
        "--io",
        choices=("auto", "kvikio", "pinned", "mmap"),
        help="how stored bytes are read (default: what measures fastest on a GPU, mmap without one)",
    )
    parser.add_argument(
        "--executor",
        default=["auto"],
        choices=("auto", "direct", "dali"),
        help="auto: all that are installed (default)",
        **several,
    )
    parser.add_argument(
        "--cache",
        default=["warm", "cold"],
        choices=("warm", "cold"),
        help="page cache when the clock starts (default: warm, then cold)",
        **several,
    )
    parser.add_argument(
        "--train",
        default=["mlp", "transformer"],
        choices=("mlp", "transformer", "none"),
        help="models to train while loading (default: mlp transformer)",
        **several,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: 2)")
    length.add_argument("--epochs", type=int, help="measure whole epochs, so many each time, instead")
    parser.add_argument("--repeat", type=int, default=3, help="measurements per setting (default: 3)")
    parser.add_argument("--threads", type=int, help="of the loader (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--field", metavar="NAME", help="feature space, where the atlas has several")
    parser.add_argument("--layer", metavar="NAME", help="layer (default: that of the feature space)")
    parser.add_argument(
        "--out", type=local_argument, metavar="FOLDER", help="write bench.txt, .json and .png there"
    )
    add_allow_links(parser)
    parser.set_defaults(command=_bench, if_interrupted="nothing was written")


# Python's parameters, as the options of this command.
_FLAGS = FLAGS | {
    "device": "--device",
    "executor": "--executor",
    "io": "--io",
    "residency": "--residency",
    "layer": "--layer",
    "field_name": "--field",
}


def _bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hbx_gpu._bench import report
    from hbx_gpu._bench.runs import Options, run

    for name in ("seconds", "repeat", "epochs", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    options = Options(
        path=args.path,
        device=args.device,
        layouts=args.layout,
        dtypes=args.dtype,
        orders=args.order,
        batches=args.batch,
        executors=args.executor,
        residencies=args.residency,
        io=args.io,
        caches=args.cache,
        models=[name for name in args.train if name != "none"],
        seconds=args.seconds,
        epochs=args.epochs,
        repeat=args.repeat,
        threads=args.threads,
        seed=args.seed,
        field=args.field,
        layer=args.layer,
        allow_links=args.allow_links,
    )
    with from_command(_FLAGS), tqdm(desc="bench", unit="setting", file=sys.stderr, mininterval=0.2) as bar:

        def begin(steps: int) -> Callable[[str], None]:
            bar.reset(total=steps)
            done = -1

            def advance(name: str) -> None:
                nonlocal done
                done += 1
                bar.update(done - bar.n)
                bar.set_postfix_str(name)

            return advance

        found = run(options, advance=begin)
        bar.update(bar.total - bar.n)
        bar.set_postfix_str("")
    print(report.text(found))
    if args.out is not None:
        written = report.write(found, args.out)
        print("written: " + ", ".join(map(str, written)))
    if found.wrong:
        print(f"hbx-gpu: error: {found.wrong} rows are not what is stored", file=sys.stderr)
    return int(found.wrong > 0)
