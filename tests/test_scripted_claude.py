"""scripted_claude.py against the real CLI: one scenario, two streams, the same shape.

The real CLI talks to ScriptedApi, which plays the scenario that the stand-in plays
itself. What is compared is everything but what differs from run to run (VOLATILE).
"""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TEST_PLANS = Path(__file__).parent.parent / "test_plans"
sys.path.insert(0, str(TEST_PLANS))

from scripted_api import ScriptedApi  # noqa: E402  (found through the line above)

pytestmark = pytest.mark.contract

STAND_IN = str(TEST_PLANS / "scripted_claude.py")
TASK = "Task 1.1 of milestone contract: Do it (attempt 1 of 3)"
ANSWER = "Answer: Task 1.1 of milestone contract: the second"
FLAGS = ("-p", "--output-format", "stream-json", "--verbose")
PERMISSIONS = ("--permission-mode", "acceptEdits",
               "--allowedTools", "Bash,Read,Write,Edit,Glob,Grep")
SCHEMA = ("--json-schema", json.dumps({
    "type": "object", "required": ["status", "summary"], "additionalProperties": False,
    "properties": {
        "status": {"enum": ["completed", "failed", "needs_human"]},
        "summary": {"type": "string"}, "error": {"type": "string"},
        "question": {"type": "string"}, "recommendation": {"type": "string"},
        "options": {"type": "array", "items": {"type": "string"}}}}))
PATIENCE_S = 60.0
VOLATILE = frozenset((
    # of the run
    "uuid", "id", "session_id", "timestamp", "task_id", "run_id", "tool_use_id",
    "duration_ms", "duration_api_ms", "ttft_ms", "ttft_stream_ms", "time_to_request_ms",
    "first_content_frame_ms", "retry_delay_ms",
    # of the installation; nobody reads them
    "tools", "slash_commands", "terminal_slash_commands", "agents", "skills", "plugins",
    "capabilities", "memory_paths", "messaging_socket_path", "structuredPatch",
    # who allowed a call: by rule or by mode
    "permission_decision"))

REPORT = {"report": {"status": "completed", "summary": "All done."}}
SLEEP = "touch started; python3 -c 'import time; time.sleep(60)'"


def real_claude() -> str:
    path = shutil.which("claude")
    if path is None and os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail("the claude CLI is missing and REQUIRE_ALL=1")
    return path or pytest.skip("the claude CLI is not installed")


@dataclass
class Stream:
    code: int
    stderr: str
    events: list[dict[str, Any]]

    @property
    def result(self) -> dict[str, Any]:
        return next(e for e in self.events if e["type"] == "result")


@dataclass
class Stage:
    """A folder with a workspace and a home of its own for one of the two programs."""

    program: str
    folder: Path
    api: ScriptedApi
    workspace: Path = field(init=False)

    def __post_init__(self) -> None:
        self.workspace = self.folder / "workspace"
        self.workspace.mkdir(parents=True)
        (self.folder / "scenarios.json").write_text(json.dumps(self.api.scenarios))

    def start(self, flags: Sequence[str], prompt: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.program, *FLAGS, *flags], cwd=self.workspace, text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder),
                 "CLAUDE_CONFIG_DIR": str(self.folder / "config"),
                 "ANTHROPIC_BASE_URL": self.api.url, "ANTHROPIC_API_KEY": "dummy",
                 "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                 "CLAUDE_CODE_MAX_RETRIES": "1", "DISABLE_AUTOUPDATER": "1",
                 "SCRIPTED_CLAUDE_SCENARIOS": str(self.folder / "scenarios.json")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin
        process.stdin.write(f"{prompt}\n\nThe task's text.\n")
        process.stdin.close()
        process.stdin = None     # else communicate() would flush it
        return process

    def finish(self, process: subprocess.Popen[str]) -> Stream:
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        text = stdout.replace(str(self.workspace), "/workspace")
        return Stream(process.returncode, stderr,
                      [json.loads(line) for line in text.splitlines()])

    def converse(self, flags: Sequence[str], prompt: str = TASK) -> Stream:
        return self.finish(self.start(flags, prompt))


Play = Callable[[Stage], Stream]


def play_both(
    tmp_path: Path, scenarios: dict[str, Any], play: Play,
) -> tuple[Stream, Stream]:
    """The real CLI's stream and the stand-in's."""
    with ScriptedApi(scenarios) as api:
        return (play(Stage(real_claude(), tmp_path / "real", api)),
                play(Stage(STAND_IN, tmp_path / "stand-in", api)))


def shape(value: Any, key: str = "") -> Any:
    """The value without what differs from run to run; there its type is kept."""
    if key in VOLATILE:
        return type(value).__name__
    if isinstance(value, dict):
        return {name: shape(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"(check your inference gateway).*", r"\1", value)
    return round(value, 6) if isinstance(value, float) else value


def assert_same_shape(real: Stream, stand_in: Stream) -> None:
    assert [shape(event) for event in stand_in.events] == [
        shape(event) for event in real.events]
    assert (stand_in.code, stand_in.stderr) == (real.code, real.stderr)


def task(*steps: Any, answer: Sequence[Any] = ()) -> dict[str, Any]:
    """Scenarios of task 1.1: its steps, and what its answer sets going."""
    return {"contract/1.1": {"attempts": [list(steps)]},
            "contract/1.1/answer": {"attempts": [list(answer)]}}


CONVERSATIONS: dict[str, tuple[list[Any], Sequence[str]]] = {
    "a task is completed": (
        [{"say": "Writing."}, {"write": "a/b.txt", "content": ["one", "two"]},
         {"write": "a/b.txt", "content": "one\n"}, {"bash": "cat a/b.txt; echo e >&2"},
         {"edit": "a/b.txt", "old": "one", "new": "1"}, REPORT], SCHEMA),
    "a command and an edit fail, then the task": (
        [{"bash": "echo out; exit 3"}, {"write": "c.txt", "content": "c"},
         {"edit": "c.txt", "old": "no such text", "new": "x"},
         {"report": {"status": "failed", "summary": "No.", "error": "It broke."}}],
        SCHEMA),
    "the agent asks": (
        [{"bash": "ls"},
         {"report": {"status": "needs_human", "summary": "Open.", "question": "Which?",
                     "options": ["the first", "the second"],
                     "recommendation": "the second"}}], SCHEMA),
    "text without a schema": ([{"bash": "true"}, REPORT], ()),
    "no report though a schema asks for it": ([{"say": "I am done."}], SCHEMA),
    "the turns run out": ([{"bash": "true"}] * 3, (*SCHEMA, "--max-turns", "2")),
    "the report is the last turn": ([{"bash": "true"}, REPORT],
                                    (*SCHEMA, "--max-turns", "2")),
    "the money runs out": ([{"bash": "true"}] * 3,
                           (*SCHEMA, "--max-budget-usd", "0.01")),
    "an outage in the middle": (
        [{"bash": "true"}, {"api_error": {"status": 529, "error": "overloaded"}},
         REPORT], SCHEMA),
    "no credit": ([{"api_error": {"status": 400}}, REPORT], SCHEMA),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_streams_have_the_same_shape_when(name: str, tmp_path: Path) -> None:
    steps, flags = CONVERSATIONS[name]
    real, stand_in = play_both(
        tmp_path, task(*steps), lambda stage: stage.converse((*PERMISSIONS, *flags)))
    assert_same_shape(real, stand_in)


def test_a_resumed_session_keeps_its_id_and_goes_on_counting_its_cost(
    tmp_path: Path,
) -> None:
    def play(stage: Stage) -> Stream:
        session = stage.converse((*PERMISSIONS, *SCHEMA)).result["session_id"]
        stream = stage.converse((*PERMISSIONS, *SCHEMA, "--resume", session), ANSWER)
        assert stream.result["session_id"] == session
        assert stream.result["total_cost_usd"] == pytest.approx(4 * 0.00908)
        return stream

    scenarios = task({"bash": "true"}, REPORT, answer=[{"bash": "pwd"}, REPORT])
    assert_same_shape(*play_both(tmp_path, scenarios, play))


def test_an_unknown_session_is_refused(tmp_path: Path) -> None:
    unknown = ("--resume", "00000000-0000-4000-8000-000000000000")
    real, stand_in = play_both(
        tmp_path, task(REPORT), lambda stage: stage.converse((*PERMISSIONS, *unknown)))
    assert_same_shape(real, stand_in)


@pytest.mark.parametrize("flags", [
    ("--no-such-flag",),
    pytest.param(("--dangerously-skip-permissions",),
                 marks=pytest.mark.skipif(os.geteuid() != 0, reason="root's refusal"))])
def test_bad_usage_is_refused_on_stderr(flags: Sequence[str], tmp_path: Path) -> None:
    real, stand_in = play_both(tmp_path, task(REPORT),
                               lambda stage: stage.converse(flags))
    assert stand_in == real


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_running_command(
    signum: signal.Signals, tmp_path: Path,
) -> None:
    def play(stage: Stage) -> Stream:
        process = stage.start((*PERMISSIONS, *SCHEMA), TASK)
        wait_until((stage.workspace / "started").exists)
        process.send_signal(signum)
        return stage.finish(process)

    real, stand_in = play_both(tmp_path, task({"bash": SLEEP}, REPORT), play)
    assert_same_shape(real, stand_in)
    assert [e["type"] for e in stand_in.events].count("result") == (
        signum == signal.SIGINT)


def test_sigint_while_the_model_is_silent_ends_without_a_result(tmp_path: Path) -> None:
    def play(stage: Stage) -> Stream:
        process = stage.start((*PERMISSIONS, *SCHEMA), TASK)
        assert process.stdout
        first = json.loads(process.stdout.readline())   # the stand-in hangs from here
        if stage.program != STAND_IN:
            assert stage.api.hanging.wait(PATIENCE_S)
        process.send_signal(signal.SIGINT)
        stream = stage.finish(process)
        return Stream(stream.code, stream.stderr, [first, *stream.events])

    real, stand_in = play_both(tmp_path, task({"hang": True}, REPORT), play)
    # within 0.1 s of the request the real CLI does print a result, later it never did
    events = [event["type"] for event in real.events if event["type"] != "result"]
    assert [event["type"] for event in stand_in.events] == events == ["system", "user"]
    assert (stand_in.code, stand_in.stderr) == (real.code, real.stderr) == (0, "")


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
