"""Side-by-side measurements of the kit and its peers: `python -m benchmarks NAME`."""


class CannotRun(Exception):
    """This machine lacks what a benchmark needs; the message says what."""
