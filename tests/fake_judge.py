"""A small OpenAI-compatible server on loopback that judges by exact match, or as a test tells it to."""

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

Say = Callable[[str], "tuple[int, object]"]  # the user's turn to HTTP status and text, bytes or seconds to wait


@dataclass
class FakeJudge:
    """What was asked, how often at a time, and what to say."""

    url: str = ""
    say: Say = field(default=lambda user: (200, verdict(user)))
    models: tuple[str, ...] = ("exact-match",)
    asked: list[dict] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    lock: Lock = field(default_factory=Lock)

    def first_calls(self) -> list[str]:
        """The user's turns of all first calls so far."""
        return [user for user in (call["messages"][-1]["content"] for call in self.asked) if "<question>" in user]


def verdict(user: str) -> str:
    """What an able judge says in either call."""
    if "<overall_summary>" in user:
        return re.findall(r"<answer>(\d)</answer>", user)[-1]
    truth, text = (inside(user, tag) for tag in ("ground_truth", "generated_text"))
    return f"It compares.\n<answer>{int(exact_match(text, truth))}</answer>"


def inside(user: str, tag: str) -> str:
    return html.unescape(re.findall(f"<{tag}>(.*?)</{tag}>", user, re.DOTALL)[0])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a busy machine accepts late, and a test asks all at once


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
            if not judge.models:
                return self._send(404, b"{}")
            listed = dict(object="list", data=[dict(id=name, object="model") for name in judge.models])
            self._send(200, json.dumps(listed).encode())

        def do_POST(self) -> None:
            call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.asked.append(call)
                judge.keys.add(self.headers.get("Authorization", ""))
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            status, said = judge.say(call["messages"][-1]["content"])
            if isinstance(said, float):
                time.sleep(said)
                said = ""
            with judge.lock:
                judge.at_once -= 1
            self._send(status, said if isinstance(said, bytes) else json.dumps(_completion(str(said), call)).encode())

        def _send(self, status: int, data: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client waits no more
                pass

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _completion(text: str, call: dict) -> dict:
    message = dict(role="assistant", content=text)
    choice = dict(index=0, message=message, finish_reason="length" if text.endswith("[cut]") else "stop")
    return dict(id="1", object="chat.completion", created=0, model=call["model"], choices=[choice])
