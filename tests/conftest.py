import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing

# Before anything imports huggingface_hub: no test may reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and on a busy machine threads wait for one another:
# the fast suite took 11 CPU minutes with two, 2.5 with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the command does: a fifth of the imports' time is garbage collections that find nothing.
gc.disable()

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """All test files are imported now: what they made is never looked through again."""
    gc.freeze()
    gc.enable()


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
