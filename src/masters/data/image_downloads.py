"""Download images over http(s) within limits, once: each is kept in this machine's cache.

Rows are not trusted, so neither are their URLs: connections to loopback, private and other addresses that are not
public are refused, after every redirect and for the very address that is connected to, so that a name which resolves to
another address the second time gains nothing. MASTERS_ALLOWED_IMAGE_HOSTS names the hosts that images may be fetched
from instead, which may have private addresses. Proxies are not used.
"""

import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpcore
import httpx

from masters.common.errors import InputError, one_line
from masters.common.files import write_atomically
from masters.common.hashing import digest
from masters.common.machine import cache_folder
from masters.config.allowlist import Setting, allows_host
from masters.data.images import MAX_BYTES

CONNECTIONS = 8  # at once
SECONDS = 30.0  # for one try, redirects included
STEP_SECONDS = 10.0  # to connect, or for the next bytes
TRIES = 3  # for errors that may pass: no connection, a broken answer, HTTP 429 and 5xx
PAUSE = 0.5  # seconds before the second try, twice that before the third
MAX_REDIRECTS = 5
MAX_URLS = 100_000  # of one source
MAX_FAILURES = 32  # in a row of one host, which is then no longer asked
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = [("User-Agent", "masters"), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 addresses


class DownloadError(Exception):
    """An image could not be downloaded; the text says why."""


class PassingError(DownloadError):
    """Another try may succeed."""


class ImageDownloads:
    """Downloads images and keeps them by URL. An error is remembered: a URL has one outcome as long as this lives."""

    def __init__(self) -> None:
        self._folder = cache_folder() / "images"
        self._errors: dict[str, str] = {}
        self._failures: Counter[str] = Counter()  # in a row, by host
        self._urls: set[str] = set()
        self._ssl_context = httpx.create_ssl_context()

    def fetch(self, urls: Iterable[str]) -> None:
        """Download those URLs that have no outcome yet. Raises InputError if the cache cannot be written."""
        new = [url for url in dict.fromkeys(urls) if url not in self._urls and url not in self._errors]
        accepted = new[: MAX_URLS - len(self._urls)]  # also those in the cache: what is accepted depends on rows alone
        self._errors |= dict.fromkeys(new[len(accepted) :], f"a source may name {MAX_URLS} URLs")
        self._urls.update(accepted)
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(self._fetch_one, [url for url in accepted if not self._file(url).exists()]))

    def read(self, url: str) -> bytes:
        """Return an image that `fetch` was asked for. Raises DownloadError if there is none."""
        if url in self._errors:
            raise DownloadError(self._errors[url])
        try:
            return self._file(url).read_bytes()
        except OSError as error:
            raise DownloadError(f"its copy in {self._folder} is gone: {error.strerror}") from None

    def _file(self, url: str) -> Path:
        return self._folder / digest(url.encode(errors="surrogatepass"))

    def _fetch_one(self, url: str) -> None:
        host = ""
        try:
            host = check_url(url).host
            if self._failures[host] >= MAX_FAILURES:
                raise DownloadError(f"not asked after {MAX_FAILURES} failures in a row of {host}")
            content = self._download_with_retries(url)
        except DownloadError as error:
            self._errors[url] = str(error)
            self._failures[host] += 1
            return
        self._failures[host] = 0
        try:
            write_atomically(self._file(url), content)
        except OSError as error:
            raise InputError(f"data.fetch_images keeps images in {self._folder}: {one_line(error)}") from None

    def _download_with_retries(self, url: str) -> bytes:
        for number in range(TRIES - 1):
            with suppress(PassingError):
                return self._download(url)
            time.sleep(PAUSE * 2**number)
        return self._download(url)

    def _download(self, url: str) -> bytes:
        """Download a URL, following redirects. Raises DownloadError."""
        backend = CheckedBackend(time.monotonic() + SECONDS)
        with httpcore.ConnectionPool(self._ssl_context, network_backend=backend) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                parts = check_url(url)
                try:
                    found = _get(pool, parts)
                except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
                    raise PassingError(f"{type(error).__name__}: {one_line(error, 200)}") from None
                except (httpcore.UnsupportedProtocol, httpx.InvalidURL, ValueError) as error:
                    raise DownloadError(one_line(error, 200)) from None
                if isinstance(found, bytes):
                    return found
                url = found
        raise DownloadError(f"more than {MAX_REDIRECTS} redirects")


def _get(pool: httpcore.ConnectionPool, url: httpx.URL) -> bytes | str:
    """Return the content of a URL, or the URL that it redirects to."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    timeouts = dict.fromkeys(("connect", "read", "write"), STEP_SECONDS)
    with pool.stream("GET", target, headers=HEADERS, extensions={"timeout": timeouts}) as answer:
        headers = httpx.Headers(answer.headers)
        if answer.status in REDIRECTS and "location" in headers:
            return str(url.join(headers["location"]))
        if answer.status != 200:
            kind = PassingError if answer.status == 429 or answer.status >= 500 else DownloadError
            raise kind(f"HTTP {answer.status}")
        if headers.get("content-encoding", "identity") != "identity":
            raise DownloadError("a compressed answer, which was not asked for")
        parts, size = [], 0
        for part in answer.iter_stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise DownloadError(f"more than {MAX_BYTES} bytes")
        return b"".join(parts)


class CheckedBackend(httpcore.SyncBackend):
    """Connects to public addresses only, except where this machine's owner allows the host.

    `deadline`: of `time.monotonic`, for all connections together.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options) -> httpcore.NetworkStream:
        """Resolve a host once, check the answers, and connect to one of them. Raises DownloadError."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PassingError(f"{host} has no address: {one_line(error, 200)}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not Setting.IMAGE_HOSTS.entries:  # else `check_url` has found the host among them
            for address in addresses:
                check_public(host, address)
        for number, address in enumerate(addresses, start=1):
            try:
                stream = super().connect_tcp(address, port, seconds_left(self._deadline, timeout), **options)
                return DeadlineStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise PassingError(f"{host} has no address")

    def connect_unix_socket(self, path: str, timeout: float | None = None, **options) -> httpcore.NetworkStream:
        raise DownloadError("a local socket is no host")


class DeadlineStream(httpcore.NetworkStream):
    """A connection that ends at a deadline, however slowly the other side sends."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, seconds_left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, seconds_left(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *arguments, **options) -> httpcore.NetworkStream:
        return DeadlineStream(self._stream.start_tls(*arguments, **options), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def seconds_left(deadline: float, timeout: float | None) -> float:
    """Return the time-out of the next step. Raises httpcore.ReadTimeout after the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout(f"it takes more than {SECONDS:g} s")
    return min(left, timeout or left)


def check_url(url: str) -> httpx.URL:
    """Return a URL's parts. Raises DownloadError unless it is http(s), without a password, of an allowed host."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise DownloadError(f"not a URL: {one_line(error, 200)}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise DownloadError(f"expected http:// or https:// and a host, found {parts.scheme[:20]}://")
    if parts.userinfo:
        raise DownloadError("the URL has a user or a password, which is not sent")
    if not allows_host(Setting.IMAGE_HOSTS, str(parts)):
        raise DownloadError(f"{parts.host} is not among the hosts that {Setting.IMAGE_HOSTS} allows")
    return parts


def check_public(host: str, address: str) -> None:
    """Raise DownloadError if an address is not public: loopback, private, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    meant = [ip]
    if isinstance(ip, ipaddress.IPv6Address):  # which may stand for an IPv4 address
        if ip.ipv4_mapped or ip in NAT64:
            meant = [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)]
        elif ip.sixtofour:
            meant.append(ip.sixtofour)
    if not all(map(_is_public, meant)):
        raise DownloadError(
            f"{host} has the address {address}, which is not public; the machine's owner can allow the host in "
            f"{Setting.IMAGE_HOSTS}"
        )


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    is_site_local = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or is_site_local)
