"""What telemetry adds to a run, by the kind of endpoint.

    python benchmarks/telemetry.py [ROUNDS]        default: 9

The least of all rounds, since what a busy machine adds is not ours.

A run of one task with the quickest agent there can be, so that nothing hides behind
the agent's work. All endpoints are on loopback.
"""
from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from table import PROGRAM, ROOT, git_repository, measured, show

AGENT = ROOT / "benchmarks" / "agent.sh"
Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
    return answer


def slow(request: BaseHTTPRequestHandler) -> None:
    time.sleep(3)
    status(200)(request)


def drip(request: BaseHTTPRequestHandler) -> None:
    """A byte of the reply now and then: no read of it ever times out."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        request.wfile.write(b"x")
        request.wfile.flush()
        time.sleep(0.3)


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """The program is gone: that is what is measured."""

    listening = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_address[1]}"
    listening.shutdown()
    listening.server_close()


@contextmanager
def black_hole() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def nowhere(url: str) -> Iterator[str]:
    yield url


ENDPOINTS = {
    "none (telemetry is off)": lambda: nowhere(""),
    "answers at once": lambda: server(status(200)),
    "refuses connections": lambda: nowhere("http://127.0.0.1:9"),
    "unknown host": lambda: nowhere("http://no-such-host.invalid:4318"),
    "takes connections, never answers": black_hole,
    "answers after 3 s": lambda: server(slow),
    "drips its answer for 5 minutes": lambda: server(drip),
    "503": lambda: server(status(503)),
    "429, Retry-After: 60": lambda: server(status(429, Retry_After="60")),
    "404 (wrong URL)": lambda: server(status(404)),
    "no TLS where https is said": lambda: server(status(200))}


def run_s(url: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = git_repository(Path(name))
        (folder / "bench.md").write_text("# Bench\n\n## Task 1.1: One\n\nDo it.\n")
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = url
        return measured([sys.executable, str(PROGRAM), "run", "bench.md", "--sandbox",
                         "local", "--claude", str(AGENT)], folder)[0]


def one_round() -> Iterator[float]:
    for kind, endpoint in ENDPOINTS.items():
        with endpoint() as url:
            yield run_s(url.replace("http", "https") if "https" in kind else url)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if sys.argv[1:] else 9
    off_s, *others_s = map(min, zip(*(one_round() for _ in range(rounds)), strict=True))
    show("seconds that telemetry adds to a run", [
        {"endpoint": kind, "added s": round(least_s - off_s, 2)}
        for kind, least_s in zip([*ENDPOINTS][1:], others_s, strict=True)])
