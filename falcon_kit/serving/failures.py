"""The exception for each failure of an endpoint, and how its responses are read safely."""

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2

from falcon_kit.display.errors import is_whole, printable
from falcon_kit.display.reading import UNEXPECTED
from falcon_kit.serving.connection import Connection, Oversized, proxy_for, redact_url

_EXPIRED, _OTHER_NAME = 10, (62, 64)  # codes of OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED, HOSTNAME and IP_ADDRESS_MISMATCH
_PATHS = re.compile(r"/(models|completions|chat/completions|info|generate_stream)$")  # which requests add to a URL
_HINTS = {
    "chat.?template": ": connect with chat='hub' or 'falcon', and the kit renders the conversation",
    r"context (length|size|window)|model length|too (long|many tokens)|max_(model_len|new_tokens|total_tokens)": (
        ": shorten the prompt or lower max_new_tokens"
    ),
}
"""What to do about a refused request, by a pattern in the endpoint's message."""


class Unavailable(ConnectionError):
    """The endpoint is busy, starting, or refuses or closes connections: `retry_stream` tries again."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def http_error(status: int, message: str, address: str, headers: Mapping[str, str]) -> Exception:
    """The exception for an HTTP error status; `message` is the endpoint's own, and may be empty."""
    quoted = f"{address} reports: {message}" if message else f"{address} gives no reason"
    if status in (401, 403):
        return PermissionError(
            f"the endpoint refused the key (HTTP {status}): pass token=..., for a server of fk.serve "
            f"token=served.key(), or set FALCON_KIT_TOKEN before connecting. {quoted}"
        )
    if 300 <= status < 400:
        target = _PATHS.sub("", redact_url(_target(address, headers.get("location", ""))))
        return ConnectionError(
            f"{address} redirects to {target} (HTTP {status}), and nothing was sent there: connect to that URL if you "
            "trust it"
        )
    if status in (429, 503):
        return Unavailable(f"the endpoint is busy (HTTP {status}): try again later. {quoted}", _retry_after(headers))
    if status == 404 or "pinned to" in message:  # `transformers serve` for another model than its own
        return LookupError(
            f"the endpoint has no such model or path (HTTP {status}): check model= and the URL. {quoted}"
        )
    if status in (400, 413, 422):
        hint = next((hint for sign, hint in _HINTS.items() if re.search(sign, message, re.IGNORECASE)), "")
        return ValueError(f"the endpoint refused the request (HTTP {status}){hint}. {quoted}")
    return ConnectionError(f"the endpoint failed (HTTP {status}). {quoted}")


def _target(address: str, location: str) -> str:
    """Where a redirect leads; the location as it is where that is no URL."""
    try:
        return urljoin(address, location)
    except ValueError:
        return printable(location)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in the Retry-After header, or until the date there by the server's clock (RFC 9110, 10.2.3)."""
    value, now = headers.get("retry-after", ""), headers.get("date", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    with suppress(*UNEXPECTED, OverflowError):
        until = parsedate_to_datetime(value).timestamp()
        return max(0.0, until - (parsedate_to_datetime(now).timestamp() if now else time.time()))
    return None


def connection_error(error: httpx2.HTTPError, address: str, connection: Connection, first: bool = False) -> Exception:
    """The exception for a connection that was refused, timed out or broke. first: whether HTTP may be the mistake."""
    if isinstance(error, Oversized):
        return ConnectionError(f"{address} {error}")
    if tls := _tls_error(error):
        return _explain_tls(tls, address)
    if isinstance(error, httpx2.ProxyError | httpx2.ConnectError | httpx2.ConnectTimeout) and proxy_for(address):
        return _explain_proxy(error, address)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Unavailable(f"nothing answers at {address}: start the server, or check host and port")
    if isinstance(error, httpx2.TimeoutException):
        seconds, argument = connection.timeout, connection.timeout_name
        return TimeoutError(f"{address} sent nothing for {seconds:g} s: give a longer {argument}=, or read its log")
    message = f"the connection to {address} broke ({type(error).__name__}): read the server's log"
    if first and address.startswith("http://"):
        message += f", or connect to https{_PATHS.sub('', address)[4:]} if it speaks TLS"
    # A server may close or reset an idle connection at the moment when the next request is sent over it.
    broken = isinstance(error, httpx2.RemoteProtocolError | httpx2.NetworkError)
    return Unavailable(message) if broken else ConnectionError(message)


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """The error of TLS behind an error of the HTTP client; None if there is none."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error


def _explain_tls(error: ssl.SSLError, address: str) -> Exception:
    """The exception for a failed TLS handshake, which fails again when it is repeated."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionError(
            f"{address} does not answer in TLS: connect to http{_PATHS.sub('', address)[5:]} if the server has no "
            "certificate"
        )
    advice = {
        _EXPIRED: "renew it on the server",
        **dict.fromkeys(_OTHER_NAME, "connect to a host name that the certificate contains"),
    }
    trust = "set SSL_CERT_FILE to the PEM file of the authority that issued it, or of the certificate if self-signed"
    return ConnectionError(
        f"the certificate of {address} is refused ({error.verify_message}): {advice.get(error.verify_code, trust)}"
    )


def _explain_proxy(error: httpx2.HTTPError, address: str) -> Exception:
    proxy, host = proxy_for(address), urlsplit(address).hostname
    without = f"set NO_PROXY={host} to connect without it"
    if isinstance(error, httpx2.ProxyError):
        return ConnectionError(f"the proxy {proxy} does not connect to {address} ({error}): {without}")
    return Unavailable(f"the proxy {proxy} for {address} does not answer: start it, or {without}")


@asynccontextmanager
async def within(seconds: float, address: str, argument: str) -> AsyncIterator[None]:
    """Raises TimeoutError after so many seconds; `argument` is the one of `connect` that sets them."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(
            f"{address} has not ended after {seconds:g} s: give a longer {argument}=, or read its log"
        ) from None


@contextmanager
def reading(address: str) -> Iterator[None]:
    """Reads events of a server: raises ConnectionError for those with wrong types, invalid UTF-8 or deep nesting."""
    try:
        yield
    except (*UNEXPECTED, OverflowError) as error:
        raise ConnectionError(
            f"{address} sent an event that is not of its protocol ({type(error).__name__}): check the URL and the "
            "server's version"
        ) from None


def json_or_none(text: str) -> Any:
    """The content of a JSON text; None if the text is not JSON, or too deeply nested to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def nested(content: Any, *keys: str) -> Any:
    """The value at nested keys of what a server sends; None where an object or a key is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def error_message(content: Any) -> str:
    """The message in an error response: a text, or {"error": {"message": ...}}, {"error": ...}, {"detail": ...}."""
    inner: list[Any] = [content]
    while inner:
        (content, *_) = inner
        content = json_or_none(content) or content if isinstance(content, str) else content
        keys = ("error", "detail", "message") if isinstance(content, Mapping) else ()
        inner = [content[key] for key in keys if content.get(key)]
    try:
        return printable(str(content))
    except RecursionError:
        return "(deeply nested)"


def token_count(value: Any) -> int | None:
    """A number of tokens that a server reports; None for anything else than a positive integer."""
    return value if is_whole(value, 1) else None


def length(value: Any) -> int | None:
    """The number of entries of a list that a server sends; None for an empty list and for anything else."""
    return token_count(len(value)) if isinstance(value, list) else None
