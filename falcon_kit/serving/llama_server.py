"""A program that runs llama.cpp's own HTTP server from the package xllamacpp.

Its options are these of `llama-server`: -m, --alias, --host, --port, -np, -c and -t (threads). For others, build
`llama-server`, and give its path as the engine of `fk.serve`.

    LLAMA_API_KEY=... python llama_server.py -m FILE --alias NAME --host 127.0.0.1 --port 8080 -np 8 -c 16384
"""

import argparse
import os
import threading

import xllamacpp


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser()
    for name in ("-m", "--alias", "--host"):
        parser.add_argument(name)
    for name in ("--port", "-np", "-c", "-t"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = given.m, [given.alias]
    params.hostnames, params.port = [given.host], given.port
    params.n_parallel, params.n_ctx = given.np, given.c
    if given.t:
        params.cpuparams.n_threads = given.t  # else as many as there are cores
    params.api_keys = [key] if (key := os.environ.get("LLAMA_API_KEY")) else []
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)  # noqa: T201  # to the log
    threading.Event().wait()


if __name__ == "__main__":
    main()
