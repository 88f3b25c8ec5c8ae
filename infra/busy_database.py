"""Repeats requests to Prefect's server while its SQLite database is locked."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# types of the ASGI specification
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_SECONDS = 10.0
PAUSES = (0.05, 0.5)  # seconds between two attempts: a random number between these
READ_METHODS = ("GET", "HEAD", "OPTIONS")
UNAVAILABLE = 503


class RetryWhileBusy:
    """ASGI middleware that handles a request again if the response is 503, for up to `RETRY_SECONDS`.

    SQLite refuses a transaction at once, without waiting, if another one has written since it began to read. Prefect
    then undoes the request and responds 503, upon which its own clients send it again. A plain client, such as a
    script that starts a run, does not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READ_METHODS:
            await self._app(scope, receive, send)
            return
        body, deadline = await _read_body(receive), time.monotonic() + RETRY_SECONDS
        if body is None:
            return
        while not await self._respond(scope, body, receive, send, is_last=time.monotonic() > deadline):
            await asyncio.sleep(random.uniform(*PAUSES))

    async def _respond(self, scope: Scope, body: bytes, receive: Receive, send: Send, is_last: bool) -> bool:
        """Handle the request. Returns False, and sends nothing, if it is to be handled again."""
        unread: list[Message] = [dict(type="http.request", body=body, more_body=False)]
        is_busy = False

        async def receive_body() -> Message:
            return unread.pop() if unread else await receive()

        async def send_unless_busy(message: Message) -> None:
            nonlocal is_busy
            if message["type"] == "http.response.start":
                is_busy = message["status"] == UNAVAILABLE and not is_last
            if not is_busy:
                await send(message)

        try:
            await self._app(dict(scope), receive_body, send_unless_busy)  # routing changes the scope
        except Exception:  # Starlette raises the error again after its response
            if not is_busy:
                raise
        return not is_busy


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request; None if the client has gone before its end."""
    body, is_complete = b"", False
    while not is_complete:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        is_complete = not message.get("more_body", False)
    return body
