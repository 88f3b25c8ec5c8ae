"""The URL of a judge: what is accepted, and where the server's API begins. Imports nothing heavy."""

from urllib.parse import urlsplit

from masters.common.errors import InputError

API_KEY_VARIABLE = "MASTERS_JUDGE_API_KEY"  # the environment variable with the server's key


def is_url(judge: str) -> bool:
    return judge.lower().startswith(("http:", "https:"))


def api_base_url(url: str) -> str:
    """Where the API begins: the URL as given, with `/v1` where it has no path. Raises InputError."""
    try:
        parts = urlsplit(url)
        right = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        raise _malformed(url) from None
    if "@" in parts.netloc:
        raise InputError(f"rewards.judge: the URL holds a user name or key, which records would keep; use {API_KEY_VARIABLE}")
    if not right or any(c.isspace() or not c.isprintable() for c in url) or parts.query or parts.fragment:
        raise _malformed(url)
    _check_takes(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _check_takes(url: str) -> None:
    """Raises InputError for what the HTTP client will not take, as a host that no name service knows."""
    import httpx  # only here: every command reads this module

    try:
        httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise _malformed(url) from None


def _malformed(url: str) -> InputError:
    return InputError(f"rewards.judge: expected http(s)://host[:port][/path], found {url!r}")
