"""The benchmarks and what each of them asks: ``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

from benchmarks.commands import dispatch

QUESTIONS = {
    "compare": "How fast is this loader beside every other one that installs, on the same data?",
    "bars": "What does a table of compare look like as a picture?",
    "throughput": "How fast are its own paths (loader, map, workers) beside plain AnnData?",
    "stages": "Where does the time of a batch go, and what does planning cost as an atlas grows?",
    "startup": "What do an atlas and a worker cost until the first batch, in seconds and in memory?",
    "codecs": "How many bits does a nonzero take in each codec, and how fast is it encoded and decoded?",
    "scale": "What do very many files cost to ingest, and very many cells to order and to open?",
    "statistics": "What do means, variances and medians cost, beside reading the same rows?",
    "verify": "How long does hbx-gpu verify take, beside reading the same files and computing their CRC32C?",
    "cloud": "How fast do cells load from object storage, beside a local disk and zarr-python?",
    "gene_orders": "What does it cost that each dataset has its genes in an order of its own?",
    "orders": "How well does each order of cells mix a batch?",
    "host_cost": "How much CPU time does the host spend on a batch, by stage?",
    "executors": "What does DALI cost per batch?",
    "tokens": "What do tokens of each model cost?",
    "multimodal": "Does a multimodal batch cost less than its parts?",
    "images": "How fast are image steps through DALI, beside torch and Pillow?",
    "scdl": "How fast is an SCDL archive read and written, here and in bionemo-scdl?",
    "kernels": "How fast is each kernel on a GPU, beside a copy of the same bytes?",
    "device": "How fast is the loader on a GPU, beside the link, its memory and the CPU loader?",
    "decompression": "Are general codecs decoded faster on host threads or by nvCOMP on a GPU?",
    "end_to_end": "How fast do batches of this loader and of others reach a GPU, and does training wait?",
}

if __name__ == "__main__":
    raise SystemExit(dispatch("benchmarks", QUESTIONS))
