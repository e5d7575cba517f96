"""Side-by-side measurements of the kit and its peers: `python -m benchmarks NAME`."""
