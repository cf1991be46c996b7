"""A published package's own tokens of cells: ``INTERPRETER token_references.py PACKAGE IN.npz OUT.npz``.

Runs in an interpreter that has the package, and imports nothing of hbx_gpu. IN holds a CSR (``indptr``,
``indices``, ``data``), ``genes`` (names), ``token`` (ids of genes) and ``medians``; OUT gets the package's
arrays, its version, and the processor time of the fastest of three calls. Only the package's calls are timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import logging
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

Cells = dict[str, np.ndarray]
Result = dict[str, Any]
PAD, MASK, CLS, EOS = 0, 1, 2, 3
ROUNDS = 3


def fastest(call: Callable[[], Result]) -> Result:
    """The last result, and the least processor time."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        result = call()
        seconds.append(time.process_time() - begin)
    return {**result, "seconds": min(seconds)}


def rows_of(cells: Cells) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns and counts of each cell."""
    bounds = cells["indptr"]
    return [(cells["indices"][a:b], cells["data"][a:b]) for a, b in itertools.pairwise(bounds)]


def dense(cells: Cells) -> np.ndarray:
    """float32 (n_cells, n_genes)."""
    table = np.zeros((len(cells["indptr"]) - 1, len(cells["genes"])), np.float32)
    for line, (columns, counts) in zip(table, rows_of(cells), strict=True):
        line[columns] = counts
    return table


def transcriptformer(cells: Cells, sampled: bool) -> Result:
    """`process_batch` over dense rows, genes in column order."""
    import torch
    from transcriptformer.data.dataloader import process_batch

    genes = cells["genes"].astype(object)
    words = {str(gene): int(token) for gene, token in zip(genes, cells["token"], strict=True)} | {
        "[PAD]": PAD
    }
    by_gene = np.vectorize(words.__getitem__, otypes=[np.int64])
    table = dense(cells)

    def call() -> Result:
        made = process_batch(
            table, None, genes, lambda names: torch.from_numpy(by_gene(names)), None, False, sampled, 2047,
            True, "[PAD]", words, 0, 30, None,
        )  # fmt: skip
        return {
            "input_ids": made["gene_token_indices"].numpy(),
            "values": made["gene_counts"].numpy(),
        }

    return fastest(call)


def _examples(cells: Cells) -> list[dict[str, Any]]:
    """Cells as tx1 and scGPT take them: <cls> and genes, with their counts."""
    import torch

    found = []
    for columns, counts in rows_of(cells):
        genes = np.concatenate([[CLS], cells["token"][columns]]).astype(np.int64)
        values = np.concatenate([[-2.0], counts]).astype(np.float32)
        found.append({"genes": torch.from_numpy(genes), "expressions": torch.from_numpy(values)})
    return found


def _without_init(name: str) -> None:
    """Import modules of a package without all that its `__init__` imports: models, and torchtext of old."""
    folder = "/".join(name.split(".")[1:])
    found = importlib.util.find_spec(name.split(".")[0])
    if found is None:
        raise ModuleNotFoundError(f"there is no {name} in {sys.executable}")
    package = types.ModuleType(name)
    package.__path__ = [f"{place}/{folder}" for place in found.submodule_search_locations or []]
    package.__spec__ = found
    package.logger = logging.getLogger(name)  # type: ignore[attr-defined]
    sys.modules[name] = package


def _collated(collator: Any, cells: Cells) -> Result:
    import torch

    def call() -> Result:
        np.random.seed(0)  # noqa: NPY002 - what scgpt draws from
        torch.manual_seed(0)
        made = collator(examples.pop())
        return {
            name: made[ours].numpy()
            for name, ours in (("input_ids", "gene"), ("values", "expr"), ("counts", "expr_raw"))
            if ours in made
        }

    examples = [_examples(cells) for _ in range(ROUNDS)]  # collators change them
    return fastest(call)


def scgpt(cells: Cells, sampled: bool) -> Result:
    """`DataCollator`, bins and padding; masks are drawn too, and not compared."""
    _without_init("scgpt")
    from scgpt.data_collator import DataCollator

    collator = DataCollator(
        do_padding=True, pad_token_id=PAD, pad_value=-2, do_mlm=True, do_binning=True, mlm_probability=0.4,
        mask_value=-1, max_length=1200, sampling=sampled, keep_first_n_tokens=1,
    )  # fmt: skip
    return _collated(collator, cells)


class _Vocabulary(dict[str, int]):
    def get_stoi(self) -> dict[str, int]:
        return self


def tahoe_x1(cells: Cells, sampled: bool) -> Result:
    """`DataCollator`, bins and padding."""
    _without_init("tahoe_x1")
    try:
        import composer.utils  # noqa: F401
    except Exception:  # it downloads tables of drugs, which are not used here
        sys.modules["composer"] = types.ModuleType("composer")
        utils = sys.modules["composer.utils"] = types.ModuleType("composer.utils")
        utils.dist = None  # type: ignore[attr-defined]
    for part in ("data", "tokenizer", "utils"):
        _without_init(f"tahoe_x1.{part}")
    sys.modules["tahoe_x1.tokenizer"].GeneVocab = dict  # type: ignore[attr-defined]
    sys.modules["tahoe_x1.utils"].download_file_from_s3_url = None  # type: ignore[attr-defined]
    from tahoe_x1.data.collator import DataCollator

    words = {str(gene): int(token) for gene, token in zip(cells["genes"], cells["token"], strict=True)}
    collator = DataCollator(
        _Vocabulary(words | {"<pad>": PAD, "<cls>": CLS}), pad_token_id=PAD, pad_value=-2, do_mlm=False,
        max_length=1024, sampling=sampled, num_bins=51,
    )  # fmt: skip
    return _collated(collator, cells)


def helical(cells: Cells, sampled: bool) -> Result:  # noqa: ARG001
    """Geneformer's ranks as helical makes them, row by row, with its `rank_genes`; V2's special tokens."""
    from helical.models.geneformer.geneformer_tokenizer import rank_genes

    token, medians = cells["token"], cells["medians"]

    def call() -> Result:
        ids = []
        for columns, counts in rows_of(cells):
            scaled = counts / counts.sum() * 10_000 / medians[columns]
            ids.append(np.concatenate([[CLS], rank_genes(scaled, token[columns])[:4094], [EOS]]))
        made = np.full((len(ids), max(map(len, ids))), PAD, np.int64)
        for line, one in zip(made, ids, strict=True):
            line[: len(one)] = one
        return {"input_ids": made}

    return fastest(call)


PACKAGES: dict[str, Callable[[Cells, bool], Result]] = {
    "transcriptformer": transcriptformer,
    "scgpt": scgpt,
    "tahoe-x1": tahoe_x1,
    "helical": helical,
}


def main(package: str, source: str, target: str) -> None:
    """Once as it is compared (nothing sampled), once as it is used and timed."""
    with np.load(source, allow_pickle=False) as file:
        cells = dict(file)
    compared = PACKAGES[package](cells, False)
    timed = PACKAGES[package](cells, True)
    np.savez(
        target, **{**compared, "seconds": timed["seconds"], "version": importlib.metadata.version(package)}
    )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(*sys.argv[1:])
