"""A small OpenAI-compatible server on loopback that judges by exact match, or replies as a test says."""

import html
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

from masters.rewards.rules import exact_match

Reply = Callable[
    [str], "tuple[int, object]"
]  # from the user's turn to the HTTP status and the text, body or seconds to wait
Respond = Callable[[dict], "tuple[int, dict]"]  # from a request to the HTTP status and the body


@dataclass
class FakeJudge:
    """The requests received, how many at the same time, and the function that replies."""

    url: str = ""
    reply: Reply = field(default=lambda user: (200, judge_by_exact_match(user)))
    respond: Respond | None = None  # instead of `reply`
    models: tuple[str, ...] = ("exact-match",)
    requests: list[dict] = field(default_factory=list)
    replies: list[tuple[str, object]] = field(default_factory=list)  # the user's turn and what was sent back
    listings: int = 0  # requests for the list of models
    keys: set[str] = field(default_factory=set)
    concurrent: int = 0
    max_concurrent: int = 0
    lock: Lock = field(default_factory=Lock)

    def first_calls(self) -> list[str]:
        """Return the the user's turns of all first calls so far."""
        return [user for user in (call["messages"][-1]["content"] for call in self.requests) if "<question>" in user]


def judge_by_exact_match(user: str) -> str:
    """Reply to either call as a correct judge does."""
    if "<overall_summary>" in user:
        return re.findall(r"<answer>(\d)</answer>", user)[-1]
    truth, text = (tag_content(user, tag) for tag in ("ground_truth", "generated_text"))
    return f"It compares.\n<answer>{int(exact_match(text, truth))}</answer>"


def tag_content(user: str, tag: str) -> str:
    return html.unescape(re.findall(f"<{tag}>(.*?)</{tag}>", user, re.DOTALL)[0])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # tests send many requests at the same time


@contextmanager
def serve(**settings: object) -> Iterator[FakeJudge]:
    judge = FakeJudge(**settings)  # pyright: ignore
    server = _Server(("127.0.0.1", 0), _handler(judge))
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()


def _handler(judge: FakeJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with judge.lock:
                judge.listings += 1
            if not judge.models:
                return self._send(404, b"{}")
            listed = dict(object="list", data=[dict(id=name, object="model") for name in judge.models])
            self._send(200, json.dumps(listed).encode())

        def do_POST(self) -> None:
            call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.requests.append(call)
                judge.keys.add(self.headers.get("Authorization", ""))
                judge.concurrent += 1
                judge.max_concurrent = max(judge.max_concurrent, judge.concurrent)
            status, reply = judge.respond(call) if judge.respond else judge.reply(call["messages"][-1]["content"])
            if isinstance(reply, float):
                time.sleep(reply)
                reply = ""
            with judge.lock:
                judge.replies.append((call["messages"][-1]["content"], reply))
                judge.concurrent -= 1
            if isinstance(reply, dict):
                reply = json.dumps(reply).encode()
            body = reply if isinstance(reply, bytes) else json.dumps(_completion(str(reply), call)).encode()
            self._send(status, body)

        def _send(self, status: int, data: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has closed the connection
                pass

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _completion(text: str, call: dict) -> dict:
    message = dict(role="assistant", content=text)
    choice = dict(index=0, message=message, finish_reason="length" if text.endswith("[cut]") else "stop")
    return dict(id="1", object="chat.completion", created=0, model=call["model"], choices=[choice])
