"""Side-by-side measurements of the kit and its peers: `python -m benchmarks NAME`."""


class CannotRun(Exception):
    """A benchmark needs something that this machine does not have; the message names it."""
