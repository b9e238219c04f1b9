"""sandbox/gateway/gateway.py on loopback, in front of upstreams that play along."""
from __future__ import annotations

import http.client
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "sandbox/gateway"))

from gateway import BODY_LIMIT_BYTES, Gateway, KeyStore, Upstream

pytestmark = [pytest.mark.contract]
KEY = "sk-ant-api03-not-a-real-key"
OAUTH = "sk-ant-oat01-not-a-real-token"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Kept: yes\r\n\r\nok"
DEADLINE_S = 10.0
Send = Callable[[bytes], None]


class FakeUpstream:
    """Answers every request with `play`; `seen` holds the heads of the requests."""

    def __init__(self, play: Callable[[Send], None]) -> None:
        self.seen: list[str] = []
        self.bodies: list[bytes] = []
        fake = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = b"".join(iter(self.rfile.readline, b"\r\n")).decode("latin-1")
                length = int(head.lower().partition("content-length: ")[2].split()[0])
                fake.seen.append(head)
                fake.bodies.append(self.rfile.read(length))
                play(self.request.sendall)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class Client:
    """Speaks to a gateway of its own in front of `upstream`."""

    def __init__(self, port: int, keys: KeyStore, upstream: FakeUpstream) -> None:
        self.port, self.keys, self.upstream = port, keys, upstream

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def ask(self, path: str = "/v1/messages", *, method: str = "POST",
            body: bytes = b"{}", **headers: str) -> tuple[int, Any]:
        connection = self.connection()
        connection.request(method, path, body, {
            name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def raw(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as link:
            link.sendall(request)
            return b"".join(iter(lambda: link.recv(65536), b""))


@contextmanager
def client(folder: Path, play: Callable[[Send], None] = lambda send: send(OK), *,
           key: str = KEY) -> Iterator[Client]:
    upstream = FakeUpstream(play)
    keys = KeyStore(folder / "key")
    if key:
        keys.save(key)
    gateway = Gateway(("127.0.0.1", 0), keys=keys,
                      upstream=Upstream(f"http://127.0.0.1:{upstream.port}"))
    with running(upstream.server), running(gateway):
        yield Client(gateway.server_port, keys, upstream)


@pytest.mark.parametrize("path", [
    "/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens?beta=true"])
def test_a_messages_call_goes_on_with_the_key_and_its_query(
    tmp_path: Path, path: str,
) -> None:
    with client(tmp_path) as c:
        assert c.ask(path, body=b'{"a": 1}', anthropic_version="2023-06-01") == \
            (200, b"ok")
        (head,), (body,) = c.upstream.seen, c.upstream.bodies
    assert head.startswith(f"POST {path} HTTP/1.1\r\n") and body == b'{"a": 1}'
    assert f"\r\nx-api-key: {KEY}\r\n" in head
    assert "\r\nanthropic-version: 2023-06-01\r\n" in head


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/v1/messages"), ("PUT", "/v1/messages"), ("DELETE", "/v1/messages"),
    ("HEAD", "/"), ("GET", "/v1/models"), ("POST", "/v1/files"), ("POST", "/"),
    ("POST", "/v1/messages/batches"), ("POST", "/v1/messages/"),
    ("POST", "/v1/messages/../files"), ("POST", "/v1/messages%2f..%2ffiles"),
    ("POST", "/V1/messages"), ("POST", "/v1/messages;x"),
    ("POST", "//evil/v1/messages"),
    ("POST", "http://evil.test/v1/messages"), ("POST", "/v1/organizations/api_keys")])
def test_all_else_is_closed_and_never_reaches_upstream(
    tmp_path: Path, method: str, path: str,
) -> None:
    with client(tmp_path) as c:
        status, body = c.ask(path, method=method)
        assert status == 403 and c.upstream.seen == []
    assert method == "HEAD" or json.loads(body)["error"]["type"] == "permission_error"


def test_credentials_that_come_in_are_dropped(tmp_path: Path) -> None:
    with client(tmp_path) as c:
        c.ask(x_api_key="sk-attacker", authorization="Bearer sk-attacker",
              cookie="sk-attacker", proxy_authorization="Basic sk-attacker")
        c.raw(b"POST /v1/messages HTTP/1.1\r\nX-API-KEY: sk-attacker\r\nx-Api-Key:"
              b"\tsk-attacker\r\nAuthorization:sk-attacker\r\nContent-Length: 2\r\n"
              b"x_api_key: sk-attacker\r\n"
              b"Connection: close\r\n\r\n{}")
        assert len(c.upstream.seen) == 2
        assert all("attacker" not in head and head.count(KEY) == 1
                   for head in c.upstream.seen)


def test_an_oauth_token_goes_as_bearer_with_the_beta_it_needs(tmp_path: Path) -> None:
    with client(tmp_path, key=OAUTH) as c:
        c.ask(x_api_key="placeholder", anthropic_beta="one")
        c.ask(anthropic_beta="one,oauth-2025-04-20")
        assert all(f"\r\nauthorization: Bearer {OAUTH}\r\n" in head
                   and "x-api-key" not in head.lower()
                   and head.count("oauth-2025-04-20") == 1 and "beta: one" in head
                   for head in c.upstream.seen)


def test_without_a_key_it_says_how_to_hand_one_over(tmp_path: Path) -> None:
    with client(tmp_path, key="") as c:
        status, body = c.ask()
        assert status == 503 and c.upstream.seen == []
        assert "set-key" in json.loads(body)["error"]["message"]
        c.keys.save(KEY)                     # no restart needed
        assert c.ask()[0] == 200
        c.keys.save("sk-another")
        c.ask()
        assert "sk-another" in c.upstream.seen[-1]


def test_an_event_arrives_before_the_next_one_is_sent(tmp_path: Path) -> None:
    go_on = threading.Event()

    def play(send: Send) -> None:
        send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
             b"Transfer-Encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n")
        assert go_on.wait(DEADLINE_S)
        send(b"8\r\ndata: 2\n\r\n0\r\n\r\n")

    with client(tmp_path, play) as c:
        connection = c.connection()
        connection.request("POST", "/v1/messages", b"{}")
        answer = connection.getresponse()
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.readline() == b"data: 1\n"
        go_on.set()
        assert answer.read() == b"data: 2\n"


def test_status_headers_and_an_encoded_body_come_back_as_they_are(
    tmp_path: Path,
) -> None:
    def play(send: Send) -> None:
        send(b"HTTP/1.1 429 Slow down\r\nretry-after: 7\r\ncontent-encoding: gzip\r\n"
             b"anthropic-ratelimit-unified-reset: 9\r\ncontent-length: 3\r\n\r\n"
             b"\x1f\0z")

    with client(tmp_path, play) as c:
        connection = c.connection()
        for _ in range(2):                   # on the same connection
            connection.request("POST", "/v1/messages", b"{}")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (429, b"\x1f\0z")
            assert answer.headers["retry-after"] == "7"
            assert answer.headers["content-encoding"] == "gzip"
            assert answer.headers["anthropic-ratelimit-unified-reset"] == "9"


@pytest.mark.parametrize("answer", [
    b"content-length: 9\r\n\r\nhalf", b"transfer-encoding: chunked\r\n\r\n9\r\nhalf",
    b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"])
def test_an_answer_that_ends_early_does_not_look_complete(
    tmp_path: Path, answer: bytes,
) -> None:
    with client(tmp_path, lambda send: send(b"HTTP/1.1 200 OK\r\n" + answer)) as c:
        with pytest.raises(http.client.IncompleteRead):
            c.ask()


@pytest.mark.parametrize(("head", "status"), [
    (b"", 411), (b"Content-Length: x\r\n", 411), (b"Content-Length: -1\r\n", 411),
    (b"Transfer-Encoding: chunked\r\n", 411), (b"Content-Length: +2\r\n", 411),
    (b"Content-Length: %d\r\n" % (BODY_LIMIT_BYTES + 1), 413),
    (b"Content-Length: 2\r\nX-A: a\r\n b\r\n", 400)])
def test_a_request_that_cannot_be_passed_on_is_refused(
    tmp_path: Path, head: bytes, status: int,
) -> None:
    with client(tmp_path) as c:
        answer = c.raw(b"POST /v1/messages HTTP/1.1\r\n" + head + b"\r\n{}")
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert c.upstream.bodies == []


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n"])
def test_an_upstream_that_does_not_answer_is_a_502(
    tmp_path: Path, answer: bytes,
) -> None:
    with client(tmp_path, lambda send: send(answer)) as c:
        assert c.ask()[0] == 502


def test_an_upstream_that_is_not_there_is_a_502(tmp_path: Path) -> None:
    with client(tmp_path) as c:
        c.upstream.server.shutdown()
        c.upstream.server.socket.close()
        status, body = c.ask()
        assert status == 502 and "refused" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("text", ["", " \n", "two words", "two\nlines", "sk-ä", "a\0b"])
def test_what_cannot_be_a_key_is_refused_and_the_old_one_stays(
    tmp_path: Path, text: str,
) -> None:
    keys = KeyStore(tmp_path / "key")
    keys.save(f"{KEY}\n")
    with pytest.raises(ValueError, match="stdin"):
        keys.save(text)
    assert keys.load() == KEY
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("url", ["", "api.anthropic.com", "ftp://x", "https://"])
def test_an_upstream_that_is_no_url_is_told_at_the_start(url: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "sandbox/gateway/gateway.py")], text=True,
        env={**os.environ, "GATEWAY_UPSTREAM": url}, capture_output=True, check=False,
        timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gateway: GATEWAY_UPSTREAM is {url!r}; expected")
