"""How to reach an endpoint, and how its key stays out of every text that is shown."""

import asyncio
import json
import os
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from falcon_kit.display.errors import is_number, join_surrogates, require, shortened, shown
from falcon_kit.serving.background import background_loop

SHORTEST_SECRET = 8
"""Characters from which on a key is replaced in every text. A shorter one ("none") may be a word of the answer."""
MOST_BYTES = 8 * 2**20
"""Bytes that a server may send as one response, or in a stream until the next event. Responses have some kilobytes."""
_LONGEST_MESSAGE = 1000


class Oversized(httpx2.TransportError):
    """A response that has more than `MOST_BYTES`, or that is compressed, so that it may unpack to any number."""


class _Limited(httpx2.AsyncByteStream):
    """The bytes of a response, at most `MOST_BYTES` until `next_event`."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream, self.left = stream, MOST_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self.left -= len(part)
            if self.left < 0:
                raise Oversized(f"sends more than {MOST_BYTES:,} bytes without an end: check the URL")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _limit(response: httpx2.Response) -> None:
    """Limits the bytes of a response, before any is read."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Oversized("compresses its response, which was not asked for: switch compression off for this URL")
    response.stream = _Limited(response.stream)  # type: ignore[arg-type]  # that of an asynchronous client


def next_event(response: httpx2.Response) -> None:
    """Lets a streamed response have `MOST_BYTES` more: an event has arrived."""
    if isinstance(response.stream, _Limited):
        response.stream.left = MOST_BYTES


@dataclass(frozen=True)
class Connection:
    """How to reach an endpoint."""

    token: str | None = field(repr=False)
    """The API key, which is never shown."""
    timeout: float
    """Seconds without a byte from the endpoint until a request fails."""
    retries: int
    """Further attempts while the endpoint is busy or refuses connections."""
    deadline: float
    """Seconds for a whole answer, with all attempts."""
    direct: bool = False
    """Whether proxies of the environment are ignored, as for a server of this machine that the kit has started."""

    timeout_name: str = "timeout"
    """The argument that sets `timeout`, for errors."""

    @property
    def client(self) -> httpx2.AsyncClient:
        """The HTTP client of this process: a fork that used its parent's would write into the same connections."""
        process = os.getpid()
        if process not in self._clients:
            self._clients[process] = self._new_client()
            weakref.finalize(self, _close, self._clients[process], process).atexit = False
        return self._clients[process]

    @cached_property
    def _clients(self) -> dict[int, httpx2.AsyncClient]:
        return {}

    def _new_client(self) -> httpx2.AsyncClient:
        """With key, timeout and limit. It follows no redirect: prompt and key go to no other server.

        Callers limit the requests in flight, so it does not.

        Raises ValueError for proxies and certificates of the environment that cannot be used, and ModuleNotFoundError
        for a SOCKS proxy without socksio.
        """
        key = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            return httpx2.AsyncClient(
                headers={"Accept-Encoding": "identity"} | key,  # see `Oversized`
                timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 10)),  # 10 seconds for TCP
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
                follow_redirects=False,
                trust_env=not self.direct,
                event_hooks={"response": [_limit]},
            )
        except ImportError:
            raise ModuleNotFoundError(
                f"{_proxy_variables()} names a SOCKS proxy, which needs socksio: pip install socksio, or remove the "
                "variable"
            ) from None
        except OSError:
            raise ValueError(
                "SSL_CERT_FILE or SSL_CERT_DIR names no certificates: give the path of a PEM file, or remove the "
                "variable"
            ) from None
        except (ValueError, httpx2.InvalidURL):
            raise ValueError(
                f"{_proxy_variables()} names no proxy that can be used: its URL begins with http://, https:// or "
                "socks5://. Correct or remove the variable"
            ) from None

    def scrub(self, text: str) -> str:
        """A text from a server or a URL, without a key of at least `SHORTEST_SECRET` characters or a lone surrogate."""
        text = join_surrogates(text)
        for form in self.secrets:
            text = text.replace(form, "***")
        return text

    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """What `scrub` replaces: the key as it is, as a part of a URL, in JSON or in a `repr`, the longest first."""
        if not self.token or len(self.token) < SHORTEST_SECRET:
            return ()
        in_json = json.dumps(self.token)[1:-1]
        forms = {self.token, quote(self.token, safe=""), in_json, repr(self.token)[1:-1], repr(in_json)[1:-1]}
        return tuple(sorted(forms, key=len, reverse=True))

    def clean(self, error: BaseException) -> None:
        """Removes the key from an error, and the errors before it: those of the HTTP clients quote the request."""
        error.args = tuple(
            shortened(self.scrub(each), _LONGEST_MESSAGE) if isinstance(each, str) else each for each in error.args
        )
        error.__cause__ = error.__context__ = None


def _close(client: httpx2.AsyncClient, process: int) -> None:
    """Closes a client whose connection is garbage, in the thread of the requests. A fork has no such thread."""
    if process == os.getpid():
        asyncio.run_coroutine_threadsafe(client.aclose(), background_loop())


def _proxy_variables() -> str:
    """The variables of the environment that name a proxy."""
    proxies = ("all_proxy", "http_proxy", "https_proxy")
    return " or ".join(name for name in os.environ if name.lower() in proxies) or "the system's proxy setting"


def proxy_for(address: str) -> str | None:
    """The proxy that the environment names for an address, without its password; None if there is none."""
    parts, proxies = urlsplit(address), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return redact_url(proxy) if proxy and not proxy_bypass(parts.hostname or "") else None


def check_token(token: str | None) -> None:
    """Raises ValueError, without repeating it, for a key that no HTTP header can carry."""
    token = token or ""
    require(isinstance(token, str), f"token is one text, the key of all replicas; got {type(token).__name__}")
    require(
        token == token.strip(),
        "the key begins or ends with a space or a line end: pass it without, as token=key.strip()",
    )
    wrong = next((at for at, letter in enumerate(token) if not "!" <= letter <= "~"), None)
    require(
        wrong is None,
        f"character {wrong} of the key (counted from 0) is a space, a control character or no ASCII letter, which no "
        "HTTP header can carry: copy the key again",
    )


def redact_url(url: str) -> str:
    """The URL without user name, password, query and fragment, which may contain a key."""
    shown = url.partition("?")[0].partition("#")[0]
    before, at, after = shown.rpartition("@")
    return f"{before[: before.find('//') + 2] if '//' in before else ''}***@{after}" if at else shown


def check_seconds(**values: float) -> None:
    """Raises ValueError for a time that is out of range."""
    for name, value in values.items():
        require(is_number(value, 0, 1e9) and value > 0, f"{name}={shown(value)} must be above 0, and at most 1e9")


def check_urls(url: str | Sequence[str]) -> list[str]:
    """The URLs that `connect` is given. Raises ValueError for none, for one that is there twice, or as `check_url`."""
    urls = list(url) if isinstance(url, Iterable) and not isinstance(url, str) else [url]
    wrong = [type(each).__name__ for each in urls if not isinstance(each, str)]
    require(not wrong, f"a URL is a text such as 'http://host:port/v1', or a list of texts; got {', '.join(wrong)}")
    require(0 < len(urls) == len(set(urls)), f"give a URL, or different URLs of replicas; got {len(urls)}")
    for each in urls:
        check_url(each)
    return urls


def check_url(url: str) -> None:
    """Raises ValueError for what is no URL of an endpoint, without repeating user name, password or query."""
    valid = False
    with suppress(ValueError, httpx2.InvalidURL):  # both may quote a password
        parts = urlsplit(url.strip())
        host, port = httpx2.URL(parts.geturl()).host, parts.port
        valid = parts.scheme in ("http", "https", "sagemaker") and bool(parts.netloc) and port != 0 and bool(host)
    require(
        not valid or "@" not in parts.netloc,
        "the URL contains a user name or password, which logs would show: give a key by token=",
    )
    require(valid, f"{redact_url(url)!r} is no endpoint URL: give http://host:port/v1, or sagemaker://endpoint-name")
    require(
        redact_url(url) == url,
        f"the URL {redact_url(url)} has a query or a fragment, which no request would carry: give it without, and a "
        "key by token=",
    )


def check_credentials(urls: Sequence[str], token: str | None, session: Any) -> None:
    """Raises ValueError for a key or a session that no URL uses."""
    on_sagemaker = [each.strip().startswith("sagemaker:") for each in urls]
    require(session is None or any(on_sagemaker), "session= is for sagemaker:// only: leave it out")
    require(
        not token or not all(on_sagemaker),
        "SageMaker takes AWS credentials and no key: leave token= out, or pass session=boto3.Session(...)",
    )


def token_from_environment(urls: Sequence[str]) -> str | None:
    """FALCON_KIT_TOKEN for any host, HF_TOKEN over https for huggingface.co and its subdomains only.

    Hosts under huggingface.cloud belong to other users, so they get no key unless it is passed as `token`.
    """
    return os.environ.get("FALCON_KIT_TOKEN") or (os.environ.get("HF_TOKEN") if all(map(_is_hub, urls)) else None)


def _is_hub(url: str) -> bool:
    parts = urlsplit(url.strip())
    host = parts.hostname or ""
    return parts.scheme == "https" and (host == "huggingface.co" or host.endswith(".huggingface.co"))
