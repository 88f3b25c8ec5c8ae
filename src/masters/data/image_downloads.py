"""Download images over http(s) within limits, once: each is cached on this machine.

Rows are not trusted, so neither are their URLs: connections to loopback, private and other addresses that are not
public are refused, after every redirect and for the very address that is connected to, so that a name which resolves to
another address the second time gains nothing. MASTERS_ALLOWED_IMAGE_HOSTS names the hosts that images may be fetched
from instead, which may have private addresses. Proxies are not used.
"""

import ipaddress
import re
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
from masters.common.machine import CACHE, cache_folder
from masters.config.allowlist import Setting, allows_host
from masters.data.images import MAX_BYTES

CONNECTIONS = 8  # at once
ATTEMPT_SECONDS = 30.0  # redirects included
STEP_SECONDS = 10.0  # to connect, or for the next bytes
MAX_ATTEMPTS = 3  # after transient errors: no connection, a response that breaks off, TRANSIENT_STATUSES
BACKOFF = 0.5  # seconds before the second attempt, twice that before the third
MAX_REDIRECTS = 5
MAX_URLS = 100_000  # of one source
MAX_FAILURES = 96  # attempts in a row that end with a transient error of a host, which is then sent no more requests
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT_STATUSES = (408, 425, 429)  # and those from 500 on
# error pages by their media type, and by their first bytes where a server names none or another one
TEXT_TYPE = re.compile(r"text/|application/(?:[\w.-]+\+)?(?:json|xml)\b", re.IGNORECASE)
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[!?a-z]|\{\s*[\"}])", re.IGNORECASE)
HEADERS = [("User-Agent", "masters"), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
MAX_PORT = 65535
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 addresses
# reserved networks that `is_global` takes for public: Azure's service of a virtual machine's metadata and keys, IETF
# protocol assignments, and the former relays from IPv6 to IPv4
RESERVED_NETWORKS = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24")))


class DownloadError(Exception):
    """An image could not be downloaded; the text says why."""


class TransientError(DownloadError):
    """Another attempt may succeed."""


class ImageDownloads:
    """Downloads images and caches them by URL. It remembers errors too: a URL has one outcome as long as it lives."""

    def __init__(self) -> None:
        self._folder = cache_folder() / "images"
        self._errors: dict[str, str] = {}
        self._failures: Counter[str] = Counter()  # attempts that failed in a row, by host
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
        """Return an image that `fetch` downloaded. Raises DownloadError if there is none."""
        if url in self._errors:
            raise DownloadError(self._errors[url])
        try:
            return self._file(url).read_bytes()
        except OSError as error:
            raise DownloadError(f"its copy in {self._folder} is gone: {error.strerror}") from None

    def _file(self, url: str) -> Path:
        return self._folder / digest(url.encode(errors="surrogatepass"))

    def _fetch_one(self, url: str) -> None:
        try:
            content = self._download_with_retries(url)
        except DownloadError as error:
            self._errors[url] = str(error)
            return
        try:
            write_atomically(self._file(url), content)
        except OSError as error:
            raise InputError(
                f"data.fetch_images: expected a cache folder that can be written, found {self._folder} "
                f"({one_line(error)}); set {CACHE} to another folder"
            ) from None

    def _download_with_retries(self, url: str) -> bytes:
        for number in range(MAX_ATTEMPTS - 1):
            with suppress(TransientError):
                return self._download(url)
            time.sleep(BACKOFF * 2**number)
        return self._download(url)

    def _download(self, url: str) -> bytes:
        """Download a URL, following redirects. Raises DownloadError."""
        backend = CheckedBackend(time.monotonic() + ATTEMPT_SECONDS)
        with httpcore.ConnectionPool(self._ssl_context, network_backend=backend) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                found = self._request(pool, check_url(url))
                if isinstance(found, bytes):
                    return found
                url = found
        raise DownloadError(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, pool: httpcore.ConnectionPool, url: httpx.URL) -> bytes | str:
        """Request a URL, unless its host keeps failing. Counts transient errors alone: after others, the host works."""
        if self._failures[url.host] >= MAX_FAILURES:
            raise DownloadError(f"not requested: the last {MAX_FAILURES} attempts at {url.host} failed")
        try:
            found = _get(pool, url)
        except TransientError:
            self._failures[url.host] += 1
            raise
        except DownloadError:
            self._failures[url.host] = 0
            raise
        self._failures[url.host] = 0
        return found


def _get(pool: httpcore.ConnectionPool, url: httpx.URL) -> bytes | str:
    """Return the content of a URL, or the URL that it redirects to. Raises DownloadError."""
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    timeouts = dict.fromkeys(("connect", "read", "write"), STEP_SECONDS)
    try:
        with pool.stream("GET", target, headers=HEADERS, extensions={"timeout": timeouts}) as response:
            return _read_response(response, url)
    except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.TimeoutException) as error:
        raise TransientError(f"{type(error).__name__}: {one_line(error, 200)}") from None
    except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol, httpx.InvalidURL, ValueError) as error:
        raise DownloadError(one_line(error, 200)) from None


def _read_response(response: httpcore.Response, url: httpx.URL) -> bytes | str:
    """Return the content of a response to a request of `url`, or the URL that it redirects to. Raises DownloadError."""
    headers = httpx.Headers(response.headers)
    if response.status in REDIRECTS and "location" in headers:
        return str(url.join(headers["location"]))
    if response.status != 200:
        is_transient = response.status in TRANSIENT_STATUSES or response.status >= 500
        raise (TransientError if is_transient else DownloadError)(f"HTTP {response.status}")
    if headers.get("content-encoding", "identity") != "identity":
        raise DownloadError("expected a response without compression, as requested, found a compressed one")
    if TEXT_TYPE.match(media_type := headers.get("content-type", "")):
        raise DownloadError(f"expected an image, found {media_type[:100]}")
    parts, size = [], 0
    for part in response.iter_stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise DownloadError(f"more than {MAX_BYTES} bytes")
    content = b"".join(parts)
    if not content or PAGE.match(content):
        raise DownloadError(f"expected an image, found {'a page' if content else 'an empty response'}")
    return content


class CheckedBackend(httpcore.SyncBackend):
    """Connects to public addresses only, except where this machine's owner allows the host.

    `deadline`: of `time.monotonic`, for all connections together.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options) -> httpcore.NetworkStream:
        """Resolve a host once, check its addresses, and connect to one of them. Raises DownloadError."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise TransientError(f"{host} has no address: {one_line(error, 200)}") from None
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
        raise TransientError(f"{host} has no address")

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
        raise httpcore.ReadTimeout(f"it takes more than {ATTEMPT_SECONDS:g} s")
    return min(left, timeout or left)


def check_url(url: str) -> httpx.URL:
    """Return a URL's parts. Raises DownloadError unless it is http(s), without a password, of an allowed host."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise DownloadError(f"not a URL: {one_line(error, 200)}") from None
    if parts.port is not None and not 0 < parts.port <= MAX_PORT:  # the C library would take another port
        raise DownloadError(f"not a URL: expected a port from 1 to {MAX_PORT}, found {parts.port}")
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
    is_excluded = is_site_local or any(ip in network for network in RESERVED_NETWORKS)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or is_excluded)
