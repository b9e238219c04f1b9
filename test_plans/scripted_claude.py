#!/usr/bin/env python3
"""A stand-in for `claude -p`: plays a scenario, does its work, speaks stream-json.

It takes the real CLI's arguments, reads the prompt from stdin, writes files and runs
commands in the working directory, and prints the events of Claude Code 2.1.330.
tests/test_scripted_claude.py holds its stream against the real CLI's.

Which scenario: the first line of the prompt (see `scenario_key`) names an entry of
scenarios.json: `{"milestone/1.1": {"attempts": [[step, ...], ...]}}`, the last attempt
repeats; also `milestone/1.1/answer`, `milestone/e2e`, `milestone/fix`. Without an entry
the agent writes `work/<task id>.txt`, looks at it and reports success.

A step is one of
    {"say": text}                        text before the next tool, or the final message
    {"write": path, "content": text or list of lines}
    {"edit": path, "old": text, "new": text}
    {"bash": command}                    {"daemon": command}  outlives the agent
    {"report": object}                   ends the conversation; what follows it happens
                                         after the `result` event
    {"denied_question": input}           AskUserQuestion, refused
    {"sleep": s}  {"hang": true}  {"ignore_term": true}  {"die": code}  {"kill": signal}
    {"stderr_kb": n}  {"raw": text}  {"raw_mb_line": n}  {"bad_utf8": true}
    {"api_error": {"status": 529, "error": "overloaded"}}  {"limit": {"resets_in_s": n}}
The steps from `sleep` on may carry `"times": n`: only the first n plays, over all
processes with one configuration directory, take them.

Environment: SCRIPTED_CLAUDE_SCENARIOS (another scenario file), SCRIPTED_CLAUDE_DELAY_S
(sleep before each step), SCRIPTED_CLAUDE_LOG (one JSON line per call is appended).
Sessions are remembered under CLAUDE_CONFIG_DIR, else ~/.claude-scripted.

Slow imports stay out: a call costs about 15 ms more than starting Python.
"""
from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import FrameType
    from typing import Any, NoReturn

    Step = Mapping[str, Any]

VERSION = "2.1.330"
MODEL = "claude-opus-5-5"
TURN_USAGE = {"input_tokens": 1200, "output_tokens": 85,
              "cache_creation_input_tokens": 300, "cache_read_input_tokens": 5400}
TURN_COST_USD = 0.00908          # what the real CLI reckons for TURN_USAGE
SLOW_COMMAND_S = 2.0             # a longer command is announced by `task_started`
RETRIED = (401, 408, 409, 429)   # and everything from 500 on

VALUE_FLAGS = frozenset(
    "--output-format --input-format --json-schema --max-turns --max-budget-usd --model "
    "--fallback-model --resume --session-id --permission-mode --allowedTools "
    "--disallowedTools --tools --append-system-prompt --system-prompt --settings "
    "--setting-sources --mcp-config --add-dir --effort --name".split())
SWITCHES = frozenset(
    "--print --verbose --dangerously-skip-permissions --strict-mcp-config --bare "
    "--no-session-persistence --disable-slash-commands --version".split())
SHORT_FLAGS = {"-p": "--print", "-r": "--resume", "-v": "--version", "-n": "--name",
               "--allowed-tools": "--allowedTools",
               "--disallowed-tools": "--disallowedTools"}

API_ERRORS = {  # status: (error type, `error` of the event, text; {} takes the message)
    400: ("invalid_request_error", "billing_error", "Credit balance is too low"),
    401: ("authentication_error", "authentication_failed",
          "Invalid API key · Fix external API key"),
    404: ("not_found_error", "model_not_found",
          f"There's an issue with the selected model ({MODEL}). It may not exist or "
          "you may not have access to it. Run --model to pick a different model."),
    429: ("rate_limit_error", "rate_limit", "API Error: Request rejected (429) · {}"),
}
SERVER_ERROR = (
    "API Error: {status} {{}}. This is a server-side issue, usually temporary — try "
    "again in a moment. If it persists, check your inference gateway.")
PLAIN_MESSAGES = {400: "Your credit balance is too low to access the API.",
                  401: "invalid x-api-key", 404: "model not found",
                  429: "This request would exceed your rate limit.",
                  500: "Internal server error", 503: "Service unavailable",
                  529: "Overloaded"}


def error_kind(status: int) -> str:
    """The API's `error.type` for that HTTP status."""
    if status in API_ERRORS:
        return API_ERRORS[status][0]
    return "overloaded_error" if status == 529 else "api_error"


# ---- scenarios: shared with scripted_api.py ----------------------------------------

FIRST_LINES = (  # the contract with the prompts; groups: milestone or (task, milestone)
    (re.compile(r"Task e2e-fix-\d+ of milestone (.+?): E2E fix (\d+)"), "{0}/fix"),
    (re.compile(r"Task (\S+) of milestone (.+?): .*\(attempt (\d+) of \d+\)"),
     "{1}/{0}"),
    (re.compile(r"Answer: Task (\S+) of milestone (.+?):()"), "{1}/{0}/answer"),
    (re.compile(r"E2E scenario of milestone (.+) \(run (\d+)\)"), "{0}/e2e"),
)


def first_line(prompt: str) -> str:
    return prompt.lstrip().partition("\n")[0].rstrip()


def scenario_key(prompt: str) -> tuple[str, int] | None:
    """The scenario's name and the 1-based attempt; None: not one of our prompts."""
    for pattern, key in FIRST_LINES:
        match = pattern.match(first_line(prompt))
        if match:
            *names, number = match.groups()
            return key.format(*names), int(number or 1)
    return None


def load_scenarios() -> dict[str, Any]:
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "scenarios.json")
    path = os.environ.get("SCRIPTED_CLAUDE_SCENARIOS") or beside
    with open(path, encoding="utf-8") as file:
        scenarios: dict[str, Any] = json.load(file)
    return scenarios


def generic_steps(key: str) -> list[Step]:
    """What an agent does about which scenarios.json says nothing."""
    if key.endswith("/e2e"):
        return [{"report": {"status": "passed", "diagnosis": "Every step passed.",
                            "steps": ["ran the scenario"]}}]
    name = key.split("/")[1] if "/" in key else "task"
    path = f"work/{name}.txt"
    return [{"write": path, "content": f"{key}\n"}, {"bash": f"cat '{path}'"},
            {"report": {"status": "completed", "summary": f"Wrote {path}."}}]


def steps_for(prompt: str, scenarios: Mapping[str, Any]) -> list[Step]:
    key, number = scenario_key(prompt) or ("", 1)
    if key not in scenarios:
        return generic_steps(key)
    attempts = scenarios[key]["attempts"]
    steps: list[Step] = attempts[min(number, len(attempts)) - 1]
    return steps


class Turn:
    """One message of the model: text, a tool call or both, after the steps `before`."""

    def __init__(self, before: list[Step], say: str, tool: str = "",
                 tool_input: Mapping[str, Any] | None = None) -> None:
        self.before = before
        self.say = say
        self.tool = tool
        self.input = dict(tool_input or {})


def report_text(report: Mapping[str, Any]) -> str:
    """The report as STATUS markers, for a run without a schema."""
    lines = [f"STATUS: {report['status']}"]
    for name in ("summary", "question", "options", "recommendation", "error",
                 "diagnosis", "fix_plan"):
        value = report.get(name)
        if isinstance(value, list):
            lines += [f"{name.upper()}:"]
            lines += [f"{chr(65 + i)}) {option}" for i, option in enumerate(value)]
        elif value:
            lines += [f"{name.upper()}: {value}"]
    return "\n".join(lines)


def tool_calls(step: Step) -> list[tuple[str, dict[str, Any]]]:
    """The step as calls of the real CLI's tools; its Edit demands a Read before."""
    if "write" in step:
        content = step["content"]
        text = content if isinstance(content, str) else "\n".join([*content, ""])
        return [("Write", {"file_path": step["write"], "content": text})]
    if "edit" in step:
        path = step["edit"]
        return [("Read", {"file_path": path}),
                ("Edit", {"replace_all": False, "file_path": path,
                          "old_string": step["old"], "new_string": step["new"]})]
    if "bash" in step:
        return [("Bash", {"command": step["bash"],
                          "description": str(step["bash"])[:60]})]
    if "daemon" in step:
        command = f"setsid {step['daemon']} </dev/null >/dev/null 2>&1 &"
        return [("Bash", {"command": command, "description": "Start a daemon"})]
    if "denied_question" in step:
        return [("AskUserQuestion", step["denied_question"])]
    return []


def turns_of(
    steps: Iterable[Step], *, has_schema: bool,
) -> tuple[list[Turn], list[Step]]:
    """The conversation, and the steps after its end. Its last turn is the final one."""
    turns: list[Turn] = []
    waiting: list[Step] = []
    say = ""
    remaining = iter(steps)
    for step in remaining:
        if "say" in step:
            say = f"{say}\n\n{step['say']}".strip()
        elif "report" in step:
            report = step["report"]
            text = f"{say}\n\n{report_text(report)}".strip()
            turns.append(Turn(waiting, say, "StructuredOutput", report) if has_schema
                         else Turn(waiting, text))
            return turns, list(remaining)
        elif calls := tool_calls(step):
            for tool, tool_input in calls:
                turns.append(Turn(waiting, say, tool, tool_input))
                waiting, say = [], ""
        else:
            waiting.append(step)
    turns.append(Turn(waiting, say or "Done."))
    return turns, []


# ---- the command line --------------------------------------------------------------

def die(message: str, *, code: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def parse_arguments(argv: Sequence[str]) -> dict[str, str]:
    """Flags by their long name (a switch holds ""); `prompt` is the positional one."""
    options: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        name = SHORT_FLAGS.get(name, name)
        if not name.startswith("-"):
            options["prompt"] = word
        elif name in SWITCHES:
            options[name] = ""
        elif name not in VALUE_FLAGS:
            die(f"error: unknown option '{word}'")
        else:
            try:
                options[name] = value if equals else next(rest)
            except StopIteration:
                die(f"error: option '{name} <value>' argument missing")
    return options


def refuse_bad_usage(options: Mapping[str, str]) -> None:
    if ("--dangerously-skip-permissions" in options and os.geteuid() == 0
            and os.environ.get("IS_SANDBOX") != "1"):
        die("--dangerously-skip-permissions cannot be used with root/sudo privileges "
            "for security reasons")
    if "--print" not in options:
        die("scripted_claude.py: only print mode (-p) is played")
    if options.get("--output-format") != "stream-json":
        die("scripted_claude.py: only --output-format stream-json is played")
    if "--verbose" not in options:
        die("Error: When using --print, --output-format=stream-json requires --verbose")


# ---- what lasts from call to call --------------------------------------------------

def new_uuid() -> str:
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"


def memory_path(name: str) -> str:
    """A file of the scripted agent; its folder is made, in TMPDIR as a last resort."""
    configured = os.environ.get("CLAUDE_CONFIG_DIR")
    base = os.path.join(configured, "scripted") if configured else "~/.claude-scripted"
    temporary = os.environ.get("TMPDIR", "/tmp") + f"/claude-scripted-{os.geteuid()}"
    for folder in (os.path.expanduser(base), temporary):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return os.path.join(folder, name)
    raise OSError(f"no place for {name}")


def remembered(name: str) -> int | None:
    """The number kept under that name; None: never kept."""
    try:
        with open(memory_path(name), encoding="utf-8") as file:
            return int(file.read())
    except FileNotFoundError:
        return None


def remember(name: str, number: int) -> None:
    path = memory_path(name)
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        file.write(str(number))
    os.replace(file.name, path)       # whole, whenever the agent is stopped


def is_due(step: Step, place: str) -> bool:
    """Count this play of the step; False when it was played its `times` already."""
    if "times" not in step:
        return True
    name = "times-" + re.sub(r"\W", "_", place)
    plays = (remembered(name) or 0) + 1
    remember(name, plays)
    return plays <= int(step["times"])


# ---- events ------------------------------------------------------------------------

def put(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]


def stamp() -> str:
    now = time.time()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{seconds}.{int(now * 1000) % 1000:03d}Z"


def model_usage(turns: int, model: str) -> dict[str, Any]:
    if not turns:
        return {}
    return {model: {
        "inputTokens": 1200 * turns, "outputTokens": 85 * turns,
        "cacheReadInputTokens": 5400 * turns, "cacheCreationInputTokens": 300 * turns,
        "webSearchRequests": 0, "costUSD": round(TURN_COST_USD * turns, 8),
        "contextWindow": 1000000, "maxOutputTokens": 128000, "thinkingTokens": 0,
        "cacheCreationEphemeral5mInputTokens": 0,
        "cacheCreationEphemeral1hInputTokens": 0, "canonicalModel": model,
        "provider": "firstParty", "costBasis": "list"}}


def usage(turns: int) -> dict[str, Any]:
    counts = {name: count * turns for name, count in TURN_USAGE.items()}
    return {**counts, "output_tokens_details": {"thinking_tokens": 0},
            "server_tool_use": {"web_search_requests": 0, "web_fetch_requests": 0},
            "service_tier": "standard",
            "cache_creation": {"ephemeral_1h_input_tokens": 0,
                               "ephemeral_5m_input_tokens": 0},
            "inference_geo": "", "iterations": [], "speed": "standard",
            "fallback_credit": None}


SUBAGENTS = {
    "spawned": 0, "requested": {"background": 0, "foreground": 0, "unset": 0},
    "started_in_background": 0, "max_depth": 0, "spawned_by_subagents": 0,
    "completed": 0, "failed": 0, "killed": {"parent": 0, "user": 0, "system": 0},
    "refused": {"depth_limit": 0, "concurrency_limit": 0, "budget": 0}, "by_type": {}}
TOOLS = ("Task", "Bash", "Edit", "Glob", "Grep", "Read", "TaskStop", "Write")
ACCEPTED: dict[str, Any] = {"permission_decision": {
    "decision": "accept", "source": "config", "reason_type": "mode"}}
NUDGE = ("[structured-output-enforce] You MUST call the StructuredOutput tool to "
         "complete this request. Call this tool now.")
FAST_MODE = {"fast_mode_state": "off",
             "fast_mode_disabled_reason": "sdk_opt_in_required"}


def init_event(options: Mapping[str, str], model: str) -> dict[str, Any]:
    cwd = os.getcwd()
    tools = [*TOOLS, *(["StructuredOutput"] if "--json-schema" in options else [])]
    return {
        "type": "system", "subtype": "init", "cwd": cwd, "tools": tools,
        "mcp_servers": [], "model": model, "permissionMode": permission_mode(options),
        "slash_commands": [], "terminal_slash_commands": [],
        "apiKeySource": "ANTHROPIC_API_KEY", "claude_code_version": VERSION,
        "output_style": "default", "agents": [], "skills": [], "plugins": [],
        "capabilities": [], "analytics_disabled": True,
        "product_feedback_disabled": True, "served_by_anthropic": False,
        "memory_paths": {}, "original_cwd": cwd, "additional_directories": [],
        "messaging_socket_path": "", **FAST_MODE, "per_turn_effort_active": True,
        "ultrathink_available": False, "ultrathink_typed_raises": False,
        "view_mode": "default"}


def permission_mode(options: Mapping[str, str]) -> str:
    if "--dangerously-skip-permissions" in options:
        return "bypassPermissions"
    return options.get("--permission-mode", "default")


# ---- tools -------------------------------------------------------------------------

class Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class ToolFailed(Exception):
    """The tool ran and failed; the text goes to the model."""


class ToolMisused(ToolFailed):
    """The tool did not run: its input makes no sense."""


def write_file(path: str, content: str) -> tuple[str, Any]:
    existed = os.path.exists(path)
    original = read_text(path) if existed else None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)
    said = (f"The file {path} has been updated successfully." if existed else
            f"File created successfully at: {path}")
    return (f"{said} (file state is current in your context — no need to Read it back)",
            {"type": "update" if existed else "create", "filePath": path,
             "content": content, "structuredPatch": [], "originalFile": original,
             "userModified": False})


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        raise ToolMisused("File does not exist.") from None


def read_file(path: str) -> tuple[str, Any]:
    content = read_text(path)
    lines = content.split("\n")
    shown = "\n".join(f"{number}\t{line}" for number, line in enumerate(lines, start=1))
    return shown, {"type": "text", "file": {
        "filePath": path, "content": content, "numLines": len(lines), "startLine": 1,
        "totalLines": len(lines)}}


def edit_file(path: str, old: str, new: str) -> tuple[str, Any]:
    content = read_text(path)
    if old not in content:
        raise ToolMisused(f"String to replace not found in file.\nString: {old}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(content.replace(old, new, 1))
    return (f"The file {path} has been updated successfully. (file state is current in "
            "your context — no need to Read it back)",
            {"filePath": path, "oldString": old, "newString": new,
             "originalFile": content, "structuredPatch": [], "userModified": False,
             "replaceAll": False})


def start_command(command: str, output: int) -> int:
    """Start the shell in a session of its own, as the real CLI does; its PID."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    try:
        return os.posix_spawn(
            "/bin/bash", ["/bin/bash", "-c", command], os.environ, setsid=True,
            file_actions=[(os.POSIX_SPAWN_DUP2, nowhere, 0),
                          (os.POSIX_SPAWN_DUP2, output, 1),
                          (os.POSIX_SPAWN_DUP2, output, 2)])
    finally:
        os.close(nowhere)


def open_unnamed_file() -> int:
    path = memory_path(f"output-{os.getpid()}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.unlink(path)
    return descriptor


# ---- the agent ---------------------------------------------------------------------

class Agent:
    """One call: prints the events of one conversation."""

    def __init__(self, options: Mapping[str, str], session: str, turns_before: int,
                 place: str) -> None:
        self.options = options
        self.session = session
        self.turns_before = turns_before
        self.place = place
        self.model = options.get("--model") or MODEL
        self.turns = 0
        self.user_events = 0
        self.counter = int.from_bytes(os.urandom(3), "big")
        self.denials: list[dict[str, Any]] = []
        self.running: tuple[int, str, str] | None = None   # PID, tool call, what it is
        self.task: dict[str, Any] | None = None            # of an announced command
        self.started_at = time.monotonic()
        self.delay_s = float(os.environ.get("SCRIPTED_CLAUDE_DELAY_S") or 0)

    def emit(self, event: dict[str, Any]) -> None:
        event |= {"session_id": self.session, "uuid": new_uuid()}
        if event["type"] in ("assistant", "user"):
            event |= {"parent_tool_use_id": None, "timestamp": stamp()}
        put(compact(event).encode() + b"\n")

    def play(self, steps: Iterable[Step]) -> int:
        """Play the conversation to its result event; the exit status."""
        turns, after = turns_of(steps, has_schema="--json-schema" in self.options)
        self.emit(init_event(self.options, self.model))
        self.remember()
        code = self.converse(turns)
        self.remember()
        for number, step in enumerate(after):
            code = self.effect(step, f"{self.place}/after{number}") or code
        return code

    def remember(self) -> None:
        if "--no-session-persistence" not in self.options:
            remember(f"session-{self.session}", self.turns_before + self.turns)

    def converse(self, turns: Sequence[Turn]) -> int:
        max_turns = int(self.options.get("--max-turns") or 0)
        budget_usd = float(self.options.get("--max-budget-usd") or "inf")
        for number, turn in enumerate(turns):
            time.sleep(self.delay_s)
            for step_number, step in enumerate(turn.before):
                code = self.effect(step, f"{self.place}/{number}.{step_number}")
                if code is not None:
                    return code
            call_id = self.message(turn)
            if self.turns * TURN_COST_USD > budget_usd:
                return self.fail("error_max_budget_usd", "budget_exhausted",
                                 f"Reached maximum budget (${budget_usd:g})",
                                 usage=usage(self.turns - 1))
            if not turn.tool:
                self.insist(turn)
                return self.succeed(turn.say, stop_reason="end_turn")
            self.call(turn, call_id)
            if turn.tool == "StructuredOutput":
                return self.succeed(compact(turn.input), structured=turn.input)
            if self.turns == max_turns:
                return self.fail("error_max_turns", "max_turns",
                                 f"Reached maximum number of turns ({max_turns})")
        raise AssertionError("the last turn ends the conversation")

    def insist(self, turn: Turn) -> None:
        """Without the report that a schema asks for the CLI reminds the model once."""
        if "--json-schema" in self.options:
            self.user_event({"type": "text", "text": NUDGE}, isSynthetic=True)
            self.message(turn)

    def message(self, turn: Turn) -> str:
        """Emit the model's message, one event per block; the id of the tool call."""
        self.turns += 1
        self.counter += 1
        call_id = f"toolu_{self.counter:08d}"
        blocks: list[dict[str, Any]] = []
        if turn.say:
            blocks.append({"type": "text", "text": turn.say})
        if turn.tool:
            if "file_path" in turn.input:
                turn.input["file_path"] = os.path.abspath(turn.input["file_path"])
            blocks.append({"type": "tool_use", "id": call_id, "name": turn.tool,
                           "input": turn.input})
        for block in blocks:
            self.emit({"type": "assistant", "message": {
                "id": f"msg_{self.counter:08d}", "type": "message", "role": "assistant",
                "model": self.model, "content": [block], "stop_reason": None,
                "stop_sequence": None, "usage": TURN_USAGE,
                "context_management": None}})
        return call_id

    def call(self, turn: Turn, call_id: str) -> None:
        """Run the tool and emit its result."""
        block: dict[str, Any] = {"tool_use_id": call_id, "type": "tool_result"}
        extra: Any
        if not self.is_allowed(turn.tool):
            self.deny(turn, call_id)
            return
        try:
            block["content"], extra = self.run(turn.tool, turn.input, call_id)
            if turn.tool == "Bash":
                block["is_error"] = False
            meta = ACCEPTED
        except ToolMisused as error:
            block |= {"content": f"<tool_use_error>{error}</tool_use_error>",
                      "is_error": True}
            extra, meta = f"Error: {error}", {}
        except ToolFailed as error:
            block |= {"content": str(error), "is_error": True}
            extra, meta = f"Error: {error}", ACCEPTED
        self.tool_result(block, extra, meta)

    def deny(self, turn: Turn, call_id: str) -> None:
        self.denials.append({"tool_name": turn.tool, "tool_use_id": call_id,
                             "tool_input": turn.input})
        text = (f"Claude requested permissions to use {turn.tool}, but you haven't "
                "granted it yet.")
        self.emit({"type": "system", "subtype": "permission_denied", "message": text,
                   "tool_name": turn.tool, "tool_use_id": call_id})
        self.tool_result(
            {"type": "tool_result", "content": text, "is_error": True,
             "tool_use_id": call_id}, f"Error: {text}",
            {"non_execution_kind": "user-rejected",
             "permission_decision": {"decision": "reject", "source": "config"}})

    def tool_result(
        self, block: Mapping[str, Any], extra: Any, meta: Mapping[str, Any],
    ) -> None:
        event = {"tool_use_result": extra}
        if meta:
            event["tool_result_meta"] = [{"id": block["tool_use_id"], **meta}]
        self.user_event(block, **event)

    def user_event(self, block: Mapping[str, Any], **more: Any) -> None:
        self.user_events += 1
        self.emit({"type": "user", "message": {"role": "user", "content": [block]},
                   **more})

    def is_allowed(self, tool: str) -> bool:
        mode = permission_mode(self.options)
        listed = self.options.get("--allowedTools", "").replace(",", " ").split()
        return (tool != "AskUserQuestion" and
                (mode == "bypassPermissions" or tool in listed
                 or tool in ("Read", "StructuredOutput")
                 or (mode == "acceptEdits" and tool in ("Write", "Edit"))))

    def run(self, tool: str, given: Mapping[str, Any], call_id: str) -> tuple[str, Any]:
        """The tool's text for the model and its `tool_use_result`."""
        if tool == "Write":
            return write_file(given["file_path"], given["content"])
        if tool == "Read":
            return read_file(given["file_path"])
        if tool == "Edit":
            return edit_file(given["file_path"], given["old_string"],
                             given["new_string"])
        if tool == "Bash":
            return self.bash(given["command"], given["description"], call_id)
        return ("Structured output provided successfully",) * 2

    def bash(self, command: str, description: str, call_id: str) -> tuple[str, Any]:
        output = open_unnamed_file()
        self.running = (start_command(command, output), call_id, description)
        signal.setitimer(signal.ITIMER_REAL, SLOW_COMMAND_S)
        _, status = os.waitpid(self.running[0], 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.running = None
        self.end_task("completed")
        size = os.lseek(output, 0, os.SEEK_END)
        text = os.pread(output, size, 0).decode("utf-8", "replace").rstrip()
        os.close(output)
        code = os.waitstatus_to_exitcode(status)
        if code:
            code = code if code > 0 else 128 - code
            raise ToolFailed(f"Exit code {code}" + (f"\n{text}" if text else ""))
        return (text or "(Bash completed with no output)",
                {"stdout": text, "stderr": "", "interrupted": False, "isImage": False,
                 "noOutputExpected": False})

    def announce_task(self, signum: int, frame: FrameType | None) -> None:
        """SIGALRM: the running command takes long."""
        if self.running:
            _, call_id, description = self.running
            self.task = {"task_id": "b" + os.urandom(4).hex(),
                         "run_id": os.urandom(8).hex(), "tool_use_id": call_id}
            self.emit({"type": "system", "subtype": "task_started", **self.task,
                       "description": description, "is_backgrounded": False,
                       "task_type": "local_bash"})

    def end_task(self, status: str) -> None:
        if self.task:
            summary = self.running[2] if self.running else ""
            self.emit({"type": "system", "subtype": "task_notification", **self.task,
                       "status": status, "output_file": "", "summary": summary})
            self.task = None

    # -- what ends a conversation

    def result(self, *, subtype: str, terminal_reason: str, stop_reason: str | None,
               is_error: bool, **more: Any) -> None:
        elapsed_ms = int((time.monotonic() - self.started_at) * 1000)
        total = self.turns_before + self.turns
        self.emit({
            "type": "result", "subtype": subtype, "is_error": is_error,
            "duration_ms": elapsed_ms, "duration_api_ms": elapsed_ms,
            "num_turns": 1 + self.user_events, "stop_reason": stop_reason,
            "total_cost_usd": round(TURN_COST_USD * total, 8) if total else 0,
            "usage": usage(self.turns), "modelUsage": model_usage(total, self.model),
            "permission_denials": self.denials, "terminal_reason": terminal_reason,
            **FAST_MODE, "subagent_stats": SUBAGENTS, "safety_stops": 0,
            "queued_turn_count": 0, "result_index": 0,
            "model_usage_since_last_result": model_usage(self.turns, self.model),
            **more})

    def succeed(self, text: str, *, stop_reason: str = "tool_use",
                structured: Mapping[str, Any] | None = None) -> int:
        more = {} if structured is None else {"structured_output": structured}
        self.result(subtype="success", terminal_reason="completed", is_error=False,
                    stop_reason=stop_reason, api_error_status=None, result=text,
                    ttft_ms=1, ttft_stream_ms=1, time_to_request_ms=1,
                    first_content_frame_ms=1, **more)
        return 0

    def fail(self, subtype: str, terminal_reason: str, error: str, **more: Any) -> int:
        self.result(subtype=subtype, terminal_reason=terminal_reason, is_error=True,
                    stop_reason="tool_use", errors=[error], **more)
        return 1

    def api_error(self, text: str, error: str, **more: Any) -> int:
        """End as the CLI does when the API refuses: a synthetic message, a result."""
        unused = {**usage(0), "output_tokens_details": None, "service_tier": None,
                  "inference_geo": None, "iterations": None, "speed": None}
        self.emit({"type": "assistant", "message": {
            "diagnostics": None, "id": new_uuid(), "container": None,
            "model": "<synthetic>", "role": "assistant", "stop_details": None,
            "stop_reason": "stop_sequence", "stop_sequence": "", "type": "message",
            "usage": unused, "content": [{"type": "text", "text": text}],
            "context_management": None},
            "error": error, "is_api_error_message": True, **more})
        more.pop("api_error_params", None)
        self.result(subtype="success", terminal_reason="api_error", is_error=True,
                    stop_reason="stop_sequence", result=text, **more)
        return 1

    # -- steps that are not tools

    def effect(self, step: Step, place: str) -> int | None:
        """Play a step that is not the model's; an exit status when it ends the call."""
        if not is_due(step, place):
            return None
        if "api_error" in step:
            return self.refuse(**step["api_error"])
        if "limit" in step:
            return self.hit_limit(int(step["limit"]["resets_in_s"]))
        if "die" in step:
            return int(step["die"])
        misbehave(step)
        return None

    def refuse(self, status: int, error: str = "", message: str = "") -> int:
        kind = error_kind(status)
        _, code, text = API_ERRORS.get(
            status, (kind, "server_error", SERVER_ERROR.format(status=status)))
        if status >= 500 or status in RETRIED:
            retries = int(os.environ.get("CLAUDE_CODE_MAX_RETRIES") or 1)
            for attempt in range(1, retries + 1):
                self.emit({"type": "system", "subtype": "api_retry", "attempt": attempt,
                           "max_retries": retries, "retry_delay_ms": 1,
                           "error_status": status, "error": error or code})
        message = message or PLAIN_MESSAGES.get(status, error)
        return self.api_error(text.format(message), code, api_error_status=status,
                              api_error_type=kind)

    def hit_limit(self, resets_in_s: int) -> int:
        resets_at = int(time.time()) + resets_in_s
        window = {"resetsAt": resets_at, "status": "rejected"}
        limit = {**window, "rateLimitType": "five_hour", "isUsingOverage": False}
        self.emit({"type": "rate_limit_event", "rate_limit_info": {
            **limit, "unifiedWindows": {"five_hour": {"utilization": 1, **window}}}})
        clock = time.strftime("%I:%M%p", time.localtime(resets_at)).lstrip("0").lower()
        return self.api_error(
            f"You've hit your 5-hour limit · resets {clock} ({time.tzname[0]})",
            "rate_limit", api_error_status=429, api_error_type="rate_limit_error",
            api_error="usage_limit_reached",
            api_error_params={"rate_limit_info": limit})

    # -- signals

    def stop(self, signum: int) -> int:
        """End as the real CLI does: a result event only for SIGINT during a tool.

        While the model is silent the real one prints it within the first 0.1 s only.
        """
        interrupted = signum == signal.SIGINT
        running = self.running
        if running:
            os.killpg(running[0], signal.SIGKILL)
            self.end_task("stopped")
            self.report_killed_tool(running[1], interrupted=interrupted)
        if not interrupted:
            return 143
        what = "user for tool use" if running else "user"
        self.user_event({"type": "text", "text": f"[Request interrupted by {what}]"})
        if running:
            self.fail("error_during_execution", "aborted_tools",
                      "[ede_diagnostic] result_type=user last_content_type=n/a "
                      "stop_reason=tool_use")
            self.remember()
        return 0

    def report_killed_tool(self, call_id: str, *, interrupted: bool) -> None:
        text, extra = "Exit code 137", "Error: Exit code 137"
        meta = ACCEPTED
        if interrupted:
            text = ("The user doesn't want to proceed with this tool use. The tool use "
                    "was rejected (eg. if it was a file edit, the new_string was NOT "
                    "written to the file). STOP what you are doing and wait for the "
                    "user to tell you how to proceed.")
            extra = "User rejected tool use"
            meta = {"non_execution_kind": "user-rejected"}
        self.tool_result({"type": "tool_result", "content": text, "is_error": True,
                          "tool_use_id": call_id}, extra, meta)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def misbehave(step: Step) -> None:
    if "sleep" in step:
        time.sleep(step["sleep"])
    elif "hang" in step:
        while True:
            signal.pause()
    elif "ignore_term" in step:       # not SIG_IGN: the commands would inherit it
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda signum, frame: None)
    elif "kill" in step:
        os.kill(os.getpid(), step["kill"])
    else:
        make_noise(step)


def make_noise(step: Step) -> None:
    """Print what a healthy CLI never prints."""
    if "stderr_kb" in step:
        for _ in range(int(step["stderr_kb"])):
            os.write(2, b"x" * 1023 + b"\n")
    elif "raw" in step:
        put(step["raw"].encode())
    elif "raw_mb_line" in step:
        put(b'{"type":"noise","text":"')
        for _ in range(int(step["raw_mb_line"])):
            put(b"x" * (1 << 20))
        put(b'"}\n')
    elif "bad_utf8" in step:
        put(b'{"type":"noise","text":"\xff\xfe\xc3("}\n')
    else:
        raise ValueError(f"unknown step {step}")


def refuse_session(session: str) -> NoReturn:
    """End as the real CLI does when the session to resume is not known."""
    text = f"No conversation found with session ID: {session}"
    event = {"type": "result", "subtype": "error_during_execution", "duration_ms": 0,
             "duration_api_ms": 0, "is_error": True, "num_turns": 0,
             "stop_reason": None, "session_id": session, "total_cost_usd": 0,
             "usage": usage(0),
             "modelUsage": {}, "permission_denials": [], "uuid": new_uuid(),
             "errors": [text], "result_index": 0}
    put(compact(event).encode() + b"\n")
    die(text)


def log_call(argv: Sequence[str], prompt: str) -> None:
    path = os.environ.get("SCRIPTED_CLAUDE_LOG")
    if path:
        line = compact({"argv": list(argv), "prompt": prompt, "pid": os.getpid(),
                        "cwd": os.getcwd()})
        # in one piece, since others read and write it meanwhile
        with open(path, "a", encoding="utf-8", buffering=1 << 20) as file:
            file.write(line + "\n")


def on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(signum)


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    if "--version" in options:
        put(f"{VERSION} (Claude Code)\n".encode())
        return 0
    refuse_bad_usage(options)
    prompt = options.get("prompt") or sys.stdin.read()
    log_call(argv, prompt)
    if not prompt.strip():
        die("Error: Input must be provided either through stdin or as a prompt "
            "argument when using --print")
    session = options.get("--resume") or options.get("--session-id") or new_uuid()
    turns_before = remembered(f"session-{session}")
    if "--resume" in options and turns_before is None:
        refuse_session(session)
    agent = Agent(options, session, turns_before or 0, first_line(prompt))
    signal.signal(signal.SIGALRM, agent.announce_task)
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, on_signal)
        return agent.play(steps_for(prompt, load_scenarios()))
    except Stopped as stopped:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
        return agent.stop(stopped.signum)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
