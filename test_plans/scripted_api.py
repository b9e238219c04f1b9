#!/usr/bin/env python3
"""A scripted Messages API on loopback: plays scenarios.json to the real Claude CLI.

    python3 test_plans/scripted_api.py --port 0    prints the URL, serves until killed
    ANTHROPIC_BASE_URL=URL ANTHROPIC_API_KEY=any claude -p ...

It answers what scripted_claude.py would do for the same prompt. It keeps no state: the
last user text that starts with a first line of ours names the scenario and the attempt,
the assistant messages after it tell the turn. Steps that only a process can play
(`die`, `kill`, `raw`, ...) are passed over; `times` counts requests.
"""
from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scripted_claude as scripted

HANG_S = 3600.0
WORKING_DIRECTORY = re.compile(r"Primary working directory: (.+?)(?:\\n|\n|$)")
NUMBERS = itertools.count(1)     # ids must differ, from message to message


def texts_of(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in content if block.get("type") == "text"]


def locate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Our last prompt and the number of assistant messages after it; "" without one."""
    turn = 0
    for message in reversed(messages):
        if message["role"] == "assistant":
            turn += 1
        elif message["role"] == "user":
            for text in reversed(texts_of(message)):
                if scripted.scenario_key(text):
                    return text, turn
    return "", turn


def working_directory(request: Mapping[str, Any]) -> Path:
    """Where the CLI works; it says so in a text of its own. Write wants full paths."""
    match = WORKING_DIRECTORY.search(json.dumps(request["messages"], ensure_ascii=False)
                                     + json.dumps(request.get("system", "")))
    return Path(match[1] if match else "/workspace")


def content_of(turn: scripted.Turn, cwd: Path) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if turn.say:
        blocks.append({"type": "text", "text": turn.say})
    if turn.tool:
        tool_input = dict(turn.input)
        if "file_path" in tool_input:
            tool_input["file_path"] = str(cwd / tool_input["file_path"])
        blocks.append({"type": "tool_use", "id": f"toolu_{next(NUMBERS):08d}",
                       "name": turn.tool, "input": tool_input})
    return blocks


def message_of(content: list[dict[str, Any]], model: str) -> dict[str, Any]:
    called = any(block["type"] == "tool_use" for block in content)
    return {"id": f"msg_{next(NUMBERS):08d}", "type": "message", "role": "assistant",
            "model": model, "content": content, "stop_sequence": None,
            "stop_reason": "tool_use" if called else "end_turn",
            "usage": dict(scripted.TURN_USAGE)}


def sse_events(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The message as the events of a streaming answer."""
    yield {"type": "message_start",
           "message": {**message, "content": [], "stop_reason": None}}
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            start = {**block, "text": ""}
            delta = {"type": "text_delta", "text": block["text"]}
        else:
            start = {**block, "input": {}}
            delta = {"type": "input_json_delta",
                     "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": index, "content_block": start}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "usage": message["usage"],
           "delta": {"stop_reason": message["stop_reason"], "stop_sequence": None}}
    yield {"type": "message_stop"}


class Refusal(Exception):
    """The HTTP error that a step asks for."""

    def __init__(self, status: int, kind: str, message: str,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})


def refusal_of(step: Mapping[str, Any]) -> Refusal | None:
    if "api_error" in step:
        status = step["api_error"]["status"]
        message = step["api_error"].get("message") or scripted.PLAIN_MESSAGES.get(
            status, step["api_error"].get("error", ""))
        return Refusal(status, scripted.error_kind(status), message)
    if "limit" in step:
        resets_at = int(time.time()) + int(step["limit"]["resets_in_s"])
        return Refusal(429, "rate_limit_error", "Usage limit reached", {
            "anthropic-ratelimit-unified-status": "rejected",
            "anthropic-ratelimit-unified-reset": str(resets_at),
            "anthropic-ratelimit-unified-representative-claim": "five_hour"})
    return None


class ScriptedApi:
    """The server as a context manager; `url` is what ANTHROPIC_BASE_URL takes."""

    def __init__(self, scenarios: Mapping[str, Any], *, port: int = 0,
                 host: str = "127.0.0.1") -> None:
        self.scenarios = scenarios
        self._plays: Counter[str] = Counter()
        self._stopping = threading.Event()
        self.hanging = threading.Event()     # set while a request is left unanswered
        handler = type("BoundHandler", (Handler,), {"api": self})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> ScriptedApi:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The message for a request, after what its scenario does first."""
        prompt, number = locate(request["messages"])
        if not prompt:               # a side request of the CLI: a title, a summary
            return message_of([{"type": "text", "text": "ok"}], request["model"])
        has_schema = any(tool.get("name") == "StructuredOutput"
                         for tool in request.get("tools", ()))
        turns, _ = scripted.turns_of(scripted.steps_for(prompt, self.scenarios),
                                     has_schema=has_schema)
        turn = turns[min(number, len(turns) - 1)]
        for step_number, step in enumerate(turn.before):
            self._effect(step, f"{scripted.first_line(prompt)}/{number}.{step_number}")
        content = content_of(turn, working_directory(request))
        return message_of(content, request["model"])

    def _effect(self, step: Mapping[str, Any], place: str) -> None:
        self._plays[place] += 1
        if self._plays[place] > step.get("times", float("inf")):
            return
        if "hang" in step:
            self.hanging.set()
        if "sleep" in step or "hang" in step:
            self._stopping.wait(step.get("sleep", HANG_S))
        refusal = refusal_of(step)
        if refusal:
            raise refusal


class Handler(BaseHTTPRequestHandler):
    api: ScriptedApi
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.partition("?")[0]
        try:
            request = json.loads(body or b"{}")
            if path == "/v1/messages/count_tokens":
                self.send_json({"input_tokens": len(body) // 4})
            elif path == "/v1/messages":
                message = self.api.answer(request)
                self.send_message(message, streams=request.get("stream", False))
            else:
                self.send_json({})
        except Refusal as refusal:
            self.send_json({"type": "error", "error": {
                "type": refusal.kind, "message": str(refusal)}},
                status=refusal.status, headers=refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True   # the client was stopped: nobody to answer

    def do_GET(self) -> None:
        if self.path.startswith("/v1/models"):
            model = {"type": "model", "id": scripted.MODEL, "display_name": "Scripted",
                     "created_at": "2026-01-01T00:00:00Z"}
            self.send_json({"data": [model], "has_more": False, "first_id": model["id"],
                            "last_id": model["id"]})
        else:
            self.send_json({})

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def send_message(self, message: Mapping[str, Any], *, streams: bool) -> None:
        if not streams:
            self.send_json(message)
            return
        body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                       for event in sse_events(message)).encode()
        self.send_body(body, "text/event-stream")

    def send_json(self, value: Any, *, status: int = 200,
                  headers: Mapping[str, str] | None = None) -> None:
        self.send_body(json.dumps(value).encode(), "application/json", status=status,
                       headers=headers)

    def send_body(self, body: bytes, content_type: str, *, status: int = 200,
                  headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the CLI's own stream tells what was asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8397, help="0: any free port")
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    api = ScriptedApi(scripted.load_scenarios(), **vars(arguments))
    print(api.url, flush=True)
    api.serve()


if __name__ == "__main__":
    main()
