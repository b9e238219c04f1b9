"""A server on loopback that takes posts, for whoever sends them."""
from __future__ import annotations

import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)


class Receiver(ThreadingHTTPServer):
    """Serves while it is entered; `take` says with which status a post is answered."""

    def __init__(self, path: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.url = f"http://127.0.0.1:{self.server_address[1]}{path}"

    def take(self, headers: Message, body: bytes) -> int:
        raise NotImplementedError

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.shutdown()
        super().__exit__(*exc_info)


class _Post(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Receiver)
        self.send_response(self.server.take(self.headers, body))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class SpanReceiver(Receiver):
    """An OTLP/HTTP backend that decodes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Any] = []

    def take(self, headers: Message, body: bytes) -> int:
        request = ExportTraceServiceRequest.FromString(body)
        self.spans += [span for resource in request.resource_spans
                       for scope in resource.scope_spans for span in scope.spans]
        return 200
