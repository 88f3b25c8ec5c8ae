"""What a judge's server may send: so much, for so long, from nowhere else. An answer is a few hundred tokens."""

import time
from collections.abc import Iterator

import httpx

LARGEST = 1 << 20  # bytes of an answer


class Limited(httpx.SyncByteStream):
    """A body that ends with an error when it is too long or takes too long: read time-outs hold for a piece alone."""

    def __init__(self, body: httpx.SyncByteStream, seconds: float) -> None:
        self._body, self._seconds = body, seconds

    def __iter__(self) -> Iterator[bytes]:
        deadline, size = time.monotonic() + self._seconds, 0
        for piece in self._body:
            size += len(piece)
            if size > LARGEST:
                raise httpx.DecodingError(f"an answer of more than {LARGEST} bytes")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"an answer of more than {self._seconds:g} s")
            yield piece

    def close(self) -> None:
        self._body.close()


def client(seconds: float) -> httpx.Client:
    """An HTTP client with these limits that follows no redirect: who allowed a host did not allow another."""

    def limit(response: httpx.Response) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise httpx.DecodingError("a compressed answer, which was not asked for")
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = Limited(response.stream, seconds)

    headers = {"Accept-Encoding": "identity"}  # what is small when packed may be without end
    return httpx.Client(
        timeout=seconds, follow_redirects=False, headers=headers, event_hooks=dict(response=[limit]),
        limits=httpx.Limits(max_connections=None),
    )  # fmt: skip
