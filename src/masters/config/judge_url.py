"""The URL of a judge: validation, and the base URL of its API."""

from urllib.parse import urlsplit

from masters.common.errors import InputError

API_KEY_VARIABLE = "MASTERS_JUDGE_API_KEY"


def is_url(judge: str) -> bool:
    """Return whether `rewards.judge` is a URL, not a model."""
    return judge.lower().startswith(("http:", "https:"))


def api_base_url(url: str) -> str:
    """Return the base URL of the judge's API: the URL itself, with `/v1` added if it has no path.

    Raises InputError if the URL is malformed or contains credentials.
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or an IPv6 address is incomplete
        raise _malformed(url) from None
    if "@" in parts.netloc:
        raise InputError(
            "rewards.judge: the URL contains a user name or key, which would be stored with the run; "
            f"set the key in the environment variable {API_KEY_VARIABLE}"
        )
    if not has_host or any(c.isspace() or not c.isprintable() for c in url) or parts.query or parts.fragment:
        raise _malformed(url)
    _check_http_client_accepts(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _check_http_client_accepts(url: str) -> None:
    """Raise InputError for a URL that httpx rejects, such as one with an invalid host name."""
    import httpx  # imported here because every command imports this module

    try:
        httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise _malformed(url) from None


def _malformed(url: str) -> InputError:
    return InputError(f"rewards.judge: expected http(s)://host[:port][/path], found {url!r}")
