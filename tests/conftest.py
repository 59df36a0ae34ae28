import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: no test may reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and on a busy machine threads wait for one another:
# the fast suite took 11 CPU minutes with two, 2.5 with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the checkout, which the project does not ship."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the published data sets in {SHARED_DATA}")
    return SHARED_DATA
