"""Times of calls that take turns, so that what else the machine does meets all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """The seconds of each call in each round. pause: seconds before a call."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            start = clock()
            call()
            found[name].append(clock() - start)
    return found
