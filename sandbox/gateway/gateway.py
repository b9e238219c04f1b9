#!/usr/bin/env python3
"""Pass Messages API requests on, with a key that the client does not have.

    gateway.py            serves on port 8080 of $GATEWAY_LISTEN (a name or an address),
                          goes on to $GATEWAY_UPSTREAM
    gateway.py set-key    takes the key from stdin: an API key or an OAuth token

Two calls pass: POST /v1/messages and /v1/messages/count_tokens. Credentials that come
in are dropped. Answers are streamed as they arrive. The log has one line a request,
never a header or a body.
"""
from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = 8080
DEFAULT_UPSTREAM = "https://api.anthropic.com"
KEY_FILE = Path("/run/gateway/key")    # in memory: gone when the container stops
PATHS = ("/v1/messages", "/v1/messages/count_tokens")
BODY_LIMIT_BYTES = 40_000_000          # the API itself takes 32 MB
CLIENT_TIMEOUT_S = 120.0               # for the next bytes of a request
BLOCK_BYTES = 65536                    # at most; whatever has arrived is sent on
UPSTREAM_TIMEOUT_S = 900.0             # for the next bytes of an answer
CREDENTIALS = {"authorization", "cookie", "proxy-authorization", "x-api-key"}
ONE_HOP = {"connection", "content-length", "host", "keep-alive", "proxy-connection",
           "te", "trailer", "transfer-encoding", "upgrade"}   # RFC 9110, 7.6.1
PLAIN_NAME = re.compile("[A-Za-z0-9-]+")   # x_api_key may be x-api-key to somebody
OAUTH_PREFIX = "sk-ant-oat"
OAUTH_BETA = "oauth-2025-04-20"        # the API refuses OAuth tokens without it


class KeyStore:
    """The key, in a file that only this user can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, text: str) -> None:
        """Raises ValueError for what cannot be a key; the old one stays then."""
        key = text.strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{len(key)} characters on stdin are no key; expected "
                             "one line without blanks: printf %s \"$KEY\" | ...")
        new = self.path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w",
                  encoding="ascii") as file:
            file.write(key)
        new.replace(self.path)

    def load(self) -> str:
        """Empty as long as nobody has handed one over."""
        try:
            return self.path.read_text(encoding="ascii")
        except FileNotFoundError:
            return ""


class Upstream:
    """Where requests go on to. Raises ValueError for a URL that cannot be meant."""

    def __init__(self, url: str) -> None:
        self._parts = urllib.parse.urlsplit(url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise ValueError(f"GATEWAY_UPSTREAM is {url!r}; expected a URL such as "
                             f"{DEFAULT_UPSTREAM}")

    def request(self, path: str, body: bytes, headers: list[tuple[str, str]],
                ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = (http.client.HTTPSConnection if self._parts.scheme == "https"
                else http.client.HTTPConnection)
        connection = kind(self._parts.hostname or "", self._parts.port,
                          timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest("POST", self._parts.path.rstrip("/") + path,
                                  skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.putheader("content-length", str(len(body)))
            connection.putheader("connection", "close")
            connection.endheaders(body)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise


def with_key(headers: list[tuple[str, str]], key: str) -> list[tuple[str, str]]:
    """What is sent on: no credential but ours, nothing that ends at this hop."""
    kept = [(n, v) for n, v in headers
            if PLAIN_NAME.fullmatch(n) and n.lower() not in CREDENTIALS | ONE_HOP]
    if not key.startswith(OAUTH_PREFIX):
        return [*kept, ("x-api-key", key)]
    kept.append(("authorization", f"Bearer {key}"))
    if not any(n.lower() == "anthropic-beta" and OAUTH_BETA in v for n, v in kept):
        kept.append(("anthropic-beta", OAUTH_BETA))
    return kept


class Refusal(Exception):
    """An answer of the gateway itself, in the API's own form."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"gateway: {message}")
        self.status = status
        self.kind = kind


class Handler(BaseHTTPRequestHandler):
    """Base of the handlers that Gateway makes; `gateway` is set there."""

    gateway: Gateway
    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT_S
    status = 0
    sent_bytes = 0

    def serve(self) -> None:
        started = time.monotonic()
        self.status = self.sent_bytes = 0
        try:
            self.pass_on()
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError as error:      # somebody hung up in the middle of an answer
            self.close_connection = True
            self.log_message("%s", f"cut short: {error}")
        seconds = time.monotonic() - started
        self.log_message("%s", f"{self.command} {self.path[:100]!r} {self.status} "
                               f"{self.sent_bytes} bytes {seconds:.2f} s")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = serve

    def pass_on(self) -> None:
        path, _, query = self.path.partition("?")
        if self.command != "POST" or path not in PATHS:
            raise Refusal(403, "permission_error",
                          f"{self.command} {path[:100]} is closed; "
                          f"open are POST {' and '.join(PATHS)}")
        if any("\n" in value for value in self.headers.values()):
            raise Refusal(400, "invalid_request_error", "a header has several lines")
        body = self.body()
        key = self.gateway.keys.load()
        if not key:
            raise Refusal(503, "api_error", "there is no key yet; hand it over: printf "
                          "%s \"$KEY\" | docker compose exec -T gateway set-key")
        try:
            connection, answer = self.gateway.upstream.request(
                f"{path}?{query}" if query else path, body,
                with_key(self.headers.items(), key))
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(502, "api_error", f"no answer from upstream: {error}"
                          ) from error
        except ValueError as error:
            raise Refusal(400, "invalid_request_error", str(error)) from error
        try:
            self.send_on(answer)
        except http.client.HTTPException as error:
            raise ConnectionAbortedError(f"upstream: {error!r}") from error
        finally:
            connection.close()

    def body(self) -> bytes:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(411, "invalid_request_error",
                          f"content-length is {length!r}; expected a number")
        if int(length) > BODY_LIMIT_BYTES:
            raise Refusal(413, "request_too_large",
                          f"{length} bytes; at most {BODY_LIMIT_BYTES} pass")
        return self.rfile.read(int(length))

    def send_on(self, answer: http.client.HTTPResponse) -> None:
        """Chunked, so that an answer which ends early does not look complete."""
        self.start(answer.status, [(n, v) for n, v in answer.getheaders()
                                   if n.lower() not in ONE_HOP], chunked=True)
        left = answer.length          # None: it ends when upstream says so
        while left != 0 and (block := answer.read1(min(left or BLOCK_BYTES,
                                                       BLOCK_BYTES))):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            self.sent_bytes += len(block)
            left = None if left is None else left - len(block)
        if left:                      # read1 tells of no end that comes too early
            raise ConnectionAbortedError(f"upstream: {left} bytes are missing")
        self.wfile.write(b"0\r\n\r\n")

    def refuse(self, refusal: Refusal) -> None:
        self.close_connection = True  # the request's body may still be unread
        body = json.dumps({"type": "error", "error": {
            "type": refusal.kind, "message": str(refusal)}}).encode()
        try:
            self.start(refusal.status, [("content-type", "application/json"),
                                        ("content-length", str(len(body))),
                                        ("connection", "close")])
            if self.command != "HEAD":
                self.wfile.write(body)
                self.sent_bytes = len(body)
        except OSError:               # the client did not wait for it
            pass

    def start(self, status: int, headers: list[tuple[str, str]], *,
              chunked: bool = False) -> None:
        self.status = status
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if chunked:
            self.send_header("transfer-encoding", "chunked")
        self.end_headers()


class Gateway(ThreadingHTTPServer):
    """Call serve_forever(); one thread a connection."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], *, upstream: Upstream,
                 keys: KeyStore) -> None:
        self.upstream = upstream
        self.keys = keys
        super().__init__(address, type("BoundHandler", (Handler,), {"gateway": self}))


def main(argv: list[str]) -> int:
    keys = KeyStore(KEY_FILE)
    try:
        if argv == ["set-key"]:
            keys.save(sys.stdin.read())
            return 0
        if argv:
            raise ValueError("usage: gateway.py [set-key]")
        upstream = Upstream(os.environ.get("GATEWAY_UPSTREAM", DEFAULT_UPSTREAM))
    except ValueError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    address = (os.environ.get("GATEWAY_LISTEN", "127.0.0.1"), PORT)
    Gateway(address, upstream=upstream, keys=keys).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
