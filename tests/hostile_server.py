"""A chat-completions server on loopback that misbehaves as its prompts tell it to."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."


def completion(content: str | None, reason: str | None = "stop", **message: str) -> dict[str, Any]:
    """The body of a whole answer, of 3 tokens."""
    return {
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "finish_reason": reason,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"completion_tokens": 3},
    }


class HostileServer:
    """Plays what the last message of a request says: one word a try, the last one for good.

    `500 500 fine` fails twice and then answers `fine`. A word that is not known below is the
    answer. Every try is written down.

    Args:
        models: what the list of models holds; None for a server without one.
        key: what clients must send.
        loading: it answers HTTP 503 when asked for its models.
    """

    def __init__(
        self,
        models: list[str] | None = None,
        key: str | None = None,
        loading: bool = False,
    ) -> None:
        self.models = models
        self.loading = loading
        self.key = key
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.release = threading.Event()  # lets go of what is `held`
        self.num_open = 0
        self.most_open = 0
        self.port = 0
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    @property
    def base_url(self) -> str:
        """For `Endpoint`."""
        return f"http://127.0.0.1:{self.port}/v1"

    def prompts(self) -> list[str]:
        """The last message of every try, in the order they came."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        hostile = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
                """A client that has gone is no news."""

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:  # noqa: ANN401
                pass

            def do_GET(self) -> None:
                if hostile.key and self.headers["Authorization"] != f"Bearer {hostile.key}":
                    hostile.send(self, 401, {"error": {"message": f"not {hostile.key}"}})
                elif hostile.loading:
                    hostile.send(self, 503, {"error": {"message": "Loading model"}})
                elif hostile.models is None:
                    hostile.send(self, 404, {"detail": "Not Found"})
                else:
                    hostile.send(self, 200, {"data": [{"id": name} for name in hostile.models]})

            def do_POST(self) -> None:
                if self.path != "/v1/chat/completions":
                    hostile.send(self, 404, {"detail": "Not Found"})
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with hostile._lock:
                    hostile.num_open += 1
                    hostile.most_open = max(hostile.most_open, hostile.num_open)
                    hostile.bodies.append(body)
                    hostile.times.append(time.monotonic())
                try:
                    hostile.play(self, body)
                finally:
                    with hostile._lock:
                        hostile.num_open -= 1

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Close the port: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: Any,  # noqa: ANN401
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        """Answer with an object as JSON, or a text as it is; `cut` closes in the middle of it."""
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)

    def play(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """Do what the prompt says for this try."""
        prompt = body["messages"][-1]["content"]
        words = prompt.split()
        with self._lock:
            word = words[min(self._tries[prompt], len(words) - 1)]
            self._tries[prompt] += 1
        name, _, value = word.partition("=")
        if name == "after":  # seconds
            time.sleep(float(value))
            self.send(handler, 200, completion(prompt))
        elif name == "held":
            self.release.wait(30)
            self.send(handler, 200, completion(prompt))
        elif name == "together":  # with so many others
            end = time.monotonic() + 30
            while self.most_open < int(value) and time.monotonic() < end:
                time.sleep(0.01)
            self.send(handler, 200, completion(prompt))
        elif name == "down":  # for so many seconds, or for good
            self.stop()
            if value:
                threading.Timer(float(value), self.start).start()
        elif name == "retry-after":
            error = {"error": {"message": "slow down"}}
            self.send(handler, 429, error, {"Retry-After": value.replace("_", " ")})
        elif name == "too-long":
            self.send(handler, 400, {"error": {"message": TOO_LONG}})
        elif name == "cut":
            self.send(handler, 200, completion("half"), cut=True)
        elif name == "gone":
            handler.connection.close()
        elif name == "text":
            self.send(handler, 200, "<html>Bad gateway</html>")
        elif name == "list":
            self.send(handler, 200, [])
        elif name == "empty":
            self.send(handler, 200, {"choices": []})
        elif name == "null":
            self.send(handler, 200, completion(None))
        elif name == "length":
            self.send(handler, 200, completion("so far", "length"))
        elif name == "thought":
            self.send(handler, 200, completion("<think>a</think>b", reasoning_content="hidden"))
        elif name == "all-thought":
            self.send(handler, 200, completion(None, "length", reasoning_content="hidden"))
        elif name == "aborted":
            self.send(handler, 200, completion("so f", "abort"))
        elif name == "error-in-200":
            self.send(handler, 200, {"error": {"message": "exceeds the available context size"}})
        elif name.isdigit():
            self.send(handler, int(name), {"error": {"message": f"status {name}"}})
        else:
            self.send(handler, 200, completion(word))


@contextmanager
def hostile_server(**options: Any) -> Iterator[HostileServer]:  # noqa: ANN401
    """A server that listens until the block is left."""
    server = HostileServer(**options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
