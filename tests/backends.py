"""Real backends on loopback: VictoriaMetrics takes OTLP itself, Debian's Prometheus
behind vmagent. `.ci/install` fetches them into a cache folder."""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from conftest import ROOT, missing

CACHE = Path(os.environ.get("KTRDR_BACKENDS")
             or Path.home() / ".cache/ktrdr-orchestrator/backends")
READY_S = 30.0


def binary(name: str) -> str:
    path = CACHE / "usr/bin" / name
    if not path.exists():
        missing(f"{name} is not in {CACHE} (.ci/install fetches it)")
    return str(path)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} within {READY_S:.0f} s"
        time.sleep(0.05)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as reply:
        return bytes(reply.read())


class Server:
    """A process that listens on a port of its own while it is entered."""

    def __init__(self, folder: Path, name: str, health: str, *options: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._health, self._log = self.url + health, folder / f"{name}.log"
        self._argv = [binary(name), *(o.replace("PORT", str(port)) for o in options)]

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        try:
            return bool(get(self._health))
        except OSError:
            return False

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=log)
        until(self._is_ready, f"{self._argv[0]} is ready")
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._process.kill()
        self._process.wait()


class Backend:
    """Takes OTLP at `otlp` while it is entered, and answers PromQL."""

    otlp: str
    servers: tuple[Server, ...]

    def __enter__(self) -> Self:
        for server in self.servers:
            server.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for server in reversed(self.servers):
            server.__exit__()

    def query(self, expr: str, at: float) -> dict[str, float]:
        """Values of an instant query by label's value (several: joined by a space)."""
        values = urllib.parse.urlencode({"query": expr, "time": f"{at:.3f}"})
        try:
            reply = json.loads(get(f"{self.servers[0].url}/api/v1/query?{values}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error
        found = {}
        for series in reply["data"]["result"]:
            labels = {k: v for k, v in series["metric"].items() if k != "__name__"}
            key = " ".join(labels[name] for name in sorted(labels))
            found[key] = float(series["value"][1])
        return found


class VictoriaMetrics(Backend):
    def __init__(self, folder: Path) -> None:
        self.servers = (Server(
            folder, "victoria-metrics", "/health", f"-storageDataPath={folder}/data",
            "-httpListenAddr=127.0.0.1:PORT", "-opentelemetry.usePrometheusNaming",
            "-retentionPeriod=1y", "-search.latencyOffset=0s", "-search.disableCache"),)
        self.otlp = f"{self.servers[0].url}/opentelemetry/v1/metrics"


class Prometheus(Backend):
    """With the configuration of deploy/, whose OTLP receiver Debian has taken out."""

    def __init__(self, folder: Path) -> None:
        for name in ("prometheus.yml", "alerts.yml"):
            shutil.copy(ROOT / "deploy" / name, folder)
        prometheus = Server(
            folder, "prometheus", "/-/ready", f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:PORT",
            "--web.enable-remote-write-receiver")
        agent = Server(
            folder, "vmagent", "/health", "-httpListenAddr=127.0.0.1:PORT",
            f"-remoteWrite.url={prometheus.url}/api/v1/write",
            f"-remoteWrite.tmpDataPath={folder}/queue", "-remoteWrite.queues=1",
            "-remoteWrite.flushInterval=50ms", "-opentelemetry.usePrometheusNaming")
        self.servers = prometheus, agent
        self.otlp = f"{agent.url}/opentelemetry/v1/metrics"
