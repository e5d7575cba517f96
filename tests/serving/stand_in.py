"""An engine for tests of `fk.serve`: a program with the name of a real one, which a JSON file tells what to do.

It reads its own command line, writes to its log, and serves the OpenAI protocol as far as `fk.connect` needs it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PLAN = json.loads(Path(sys.argv[0]).with_suffix(".json").read_text())


def main() -> None:
    """Does what the plan says, one word after the other."""
    seen = {"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}
    if PLAN.get("child"):
        seen["child"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
    if PLAN.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[0]).with_suffix(".seen").write_text(json.dumps(seen))
    print(f"starting with the key {os.environ.get('VLLM_API_KEY')}", flush=True)
    print(PLAN.get("says", "loading"), flush=True)
    time.sleep(PLAN.get("loads", 0))
    if "exit" in PLAN:
        sys.exit(PLAN["exit"])
    if "kill" in PLAN:
        os.kill(os.getpid(), PLAN["kill"])
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


class Handler(BaseHTTPRequestHandler):
    """GET /health and /v1/models, and POST /v1/completions with one fixed text."""

    def do_GET(self) -> None:
        owner = {"id": sys.argv[sys.argv.index("--served-model-name") + 1], "owned_by": "vllm", "max_model_len": 2048}
        self.answer(json.dumps({"data": [owner]}).encode())

    def do_POST(self) -> None:
        choice = {"index": 0, "text": "Hello", "finish_reason": "length", "token_ids": [5]}
        self.answer(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\ndata: [DONE]\n\n")

    def answer(self, content: bytes) -> None:
        with Path(sys.argv[0]).with_suffix(".requests").open("a") as file:
            file.write(f"{self.command} {self.path}\n")
        right = self.headers["authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.send_response(200 if right or self.path == "/health" else 401)
        self.send_header("content-type", "application/json" if self.command == "GET" else "text/event-stream")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


if __name__ == "__main__":
    main()
