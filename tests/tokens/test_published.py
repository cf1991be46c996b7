"""A published model takes our batch as it is; HBX_TRANSFORMERS_PYTHON: an interpreter with transformers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hbx_gpu import CellSampler, make_loader, tokens
from hbx_gpu.testing import example_dataset, example_groups

INTERPRETER = os.environ.get("HBX_TRANSFORMERS_PYTHON", "")
FORWARD = """
import json, sys
import torch
from transformers import BertConfig, BertForMaskedLM

batch = torch.load(sys.argv[1])
torch.manual_seed(0)
config = BertConfig(
    vocab_size=int(sys.argv[2]), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
)
model = BertForMaskedLM(config).eval()
made = model(**batch)
made.loss.backward()
pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
wider = {name: torch.nn.functional.pad(x, (0, 5), value=pads[name]) for name, x in batch.items()}
again = model(**wider).logits[:, : made.logits.shape[1]]
real = batch["attention_mask"].bool()
print(json.dumps({
    "loss": float(made.loss), "shape": list(made.logits.shape),
    "same": bool(torch.allclose(made.logits[real], again[real], atol=1e-5)),
    "moved": bool(model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0),
}))
"""


@pytest.mark.skipif(not INTERPRETER, reason="HBX_TRANSFORMERS_PYTHON names no interpreter with transformers")
def test_bert_for_masked_lm_takes_geneformer_batches(tmp_path: Path) -> None:
    """Nothing is renamed, converted or added; padding changes nothing that is not padding."""
    dataset = example_dataset(tmp_path / "arrays", example_groups())
    uids = [str(uid) for uid in dataset.feature_uids]
    words = {uid: i + 4 for i, uid in enumerate(uids)} | {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    recipe = tokens.geneformer_v2(words, {uid: 1.0 + i / 7 for i, uid in enumerate(uids)}, mlm=0.3)
    sampler = CellSampler(dataset.groups_np, batch_size=16, seed=0)
    with make_loader(dataset, sampler, layout="tokens", tokens=recipe, executor="direct") as loader:
        batch = next(iter(loader))
    wanted = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.save(wanted, tmp_path / "batch.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [INTERPRETER, "-c", FORWARD, str(tmp_path / "batch.pt"), str(len(words))],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [*batch["input_ids"].shape, len(words)]
    assert 0 < found["loss"] < 20
    assert found["same"]
    assert found["moved"]
