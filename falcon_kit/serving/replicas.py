"""One server, or several with the same model as one: each request goes to one of them."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from falcon_kit.display.errors import require
from falcon_kit.serving.failures import Unavailable
from falcon_kit.serving.protocol import MAX_PAUSE, Delta, Request, Server


class Replicas:
    """As `Server`. A replica that was busy or did not answer rests, and another is asked at once; while all rest, the
    request waits for the first that can be asked again."""

    def __init__(self, servers: Sequence[Server]) -> None:
        """Raises ValueError for servers with different models, software or contexts."""
        first, *others = (each.facts for each in servers)
        for other in others:
            require(
                replace(other, address=first.address) == first,
                f"{first.address} has {first.model!r} on {first.server} with a context of {first.context}, "
                f"{other.address} has {other.model!r} on {other.server} with a context of {other.context}: replicas "
                "have the same",
            )
        self.facts, self.connection = first, servers[0].connection
        if others:
            self.facts = replace(first, address=f"{first.address} and {len(others)} more")
            # To ask each replica once is no further attempt.
            self.connection = replace(self.connection, retries=self.connection.retries + len(others))
        self.api, self.servers = servers[0].api, servers
        self._in_flight = [0] * len(servers)
        self._rests_until = [0.0] * len(servers)

    def body(self, request: Request) -> dict[str, Any]:
        return self.servers[0].body(request)

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        async with self.choose() as server, aclosing(server.deltas(body)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield delta

    async def count(self, request: Request) -> int:
        async with self.choose() as server:
            return await server.count(request)

    @asynccontextmanager
    async def choose(self) -> AsyncIterator[Server]:
        """The replica with the fewest requests in flight, for one request; while all rest, the first to be ready."""
        now = time.monotonic()
        at = min(range(len(self.servers)), key=lambda each: (max(now, self._rests_until[each]), self._in_flight[each]))
        self._in_flight[at] += 1
        try:
            yield self.servers[at]
        except Unavailable as error:
            now = time.monotonic()
            self._rests_until[at] = now + (error.retry_after or MAX_PAUSE)
            wait = min(self._rests_until) - now
            if wait <= 0:
                error.retry_after = 0.0  # another replica can be asked
            elif error.retry_after is not None:
                error.retry_after = min(wait, error.retry_after)
            raise
        finally:
            self._in_flight[at] -= 1
