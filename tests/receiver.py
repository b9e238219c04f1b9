"""A server on loopback that takes posts, for whoever sends them."""
from __future__ import annotations

import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces


class Receiver(ThreadingHTTPServer):
    """Serves while it is entered; `take` says with which status a post is answered."""

    def __init__(self, path: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.url = f"http://127.0.0.1:{self.server_address[1]}{path}"

    def take(self, path: str, headers: Message, body: bytes) -> int:
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
        self.send_response(self.server.take(self.path, self.headers, body))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class OtlpReceiver(Receiver):
    """An OTLP/HTTP backend that decodes what it gets; `status` is what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Any] = []
        self.pushes: list[Totals] = []       # of metrics, first to last
        self.resources: list[dict[str, str]] = []
        self.starts_ns: list[int] = []
        self.status = 200

    def take(self, path: str, headers: Message, body: bytes) -> int:
        if self.status != 200:
            return self.status
        if path == "/v1/traces":
            for resource in traces.ExportTraceServiceRequest.FromString(
                    body).resource_spans:
                self.resources.append(_attributes(resource.resource))
                self.spans += [span for scope in resource.scope_spans
                               for span in scope.spans]
            return 200
        assert path == "/v1/metrics", path
        for sent in metrics.ExportMetricsServiceRequest.FromString(
                body).resource_metrics:
            self.resources.append(_attributes(sent.resource))
            totals: Totals = {}
            for metric in sent.scope_metrics[0].metrics:
                kind = metric.WhichOneof("data")
                for point in getattr(metric, kind).data_points:
                    key = metric.name, *sorted(_attributes(point).items())
                    self.starts_ns += [point.start_time_unix_nano] * (kind != "gauge")
                    totals[key] = point.sum if kind == "histogram" else \
                        point.as_double or point.as_int
            self.pushes.append(totals)
        return 200


Totals = dict[tuple[Any, ...], float]


def _attributes(of: Any) -> dict[str, str]:
    return {a.key: a.value.string_value for a in of.attributes}
