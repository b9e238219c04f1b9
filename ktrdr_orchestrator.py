#!/usr/bin/env python3
"""Run a milestone plan, task by task, with Claude Code inside a sandbox.

    run, resume, task PLAN [ID]    work; check, explain    read, change nothing
    status, history, costs, logs   look; fetch             bring the work home
    sandbox init|up|reset|shell|claude|status|down         the docker sandbox's life

What it promises, and tests/ proves
    1. A completed task's attempt, verdict and checkpoint were saved before it counts.
    2. Killing this program at any instant loses at most the attempt in flight, and
       evades no limit: an attempt is counted before it starts.
    3. Two runs of one milestone, or of one sandbox, never overlap.
    4. Nothing an agent wrote is executed outside the sandbox; the host repository
       gets nothing but a branch of its own, by `fetch`.
    5. Without a terminal it never waits for a person; the exit status tells.
    6. When a run ends, no process that it started is alive, in the sandbox either.
    7. Every limit that is announced is enforced.
    8. No secret in argv, state, transcripts, file names, telemetry, image or container.
    9. Telemetry that is off, dead, slow or wrong changes nothing but the telemetry.

Files, under the state directory: <milestone>_state.json (StateStore), .lock (RunLock),
    ledger.jsonl (Ledger), <milestone>/<task>-<n>.ndjson and .stderr (Transcript)
Settings: flag > environment ORCHESTRATOR_* > orchestrator.ini > default (Config)
Exit status: 0 done, 1 failed, 2 usage, plan, settings or state, 3 a person is needed,
    4 already running, 5 sandbox unusable, 70 bug, 75 try later, 130, 143 interrupted

How to read this file: top to bottom. A section uses only names from sections above
it; the tag in its banner says what it may touch: [vocabulary] words, validation only;
[pure] decisions, no I/O, clock or environment; [shell] adapters, one outside thing
each; [flow] order of work, through adapters handed in; [cli] arguments, wiring.
"""
from __future__ import annotations

import argparse
import configparser
import contextlib
import dataclasses
import difflib
import enum
import fcntl
import hashlib
import itertools
import json
import os
import queue
import re
import select
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, TextIO

__version__ = "0.1.0"
PROGRAM = "ktrdr-orchestrator"

# ==== 1. Constants, exit codes, errors ========================= [vocabulary]
STATE_VERSION = 1                # raised on every incompatible change of the state file
KILL_GRACE_S = 3.0               # SIGINT -> SIGKILL; the CLI answers SIGINT in 0.35 s
RESULT_GRACE_S = 10.0            # `result` event -> end; seen to hang for over 60 s
DRAIN_GRACE_S = 0.5              # exit of the process -> its pipes are given up
HEARTBEAT_S = 30.0               # a silent agent is mentioned this often
MAX_LINE_BYTES = 2 << 20         # a longer event goes to the transcript undecoded
STDERR_TAIL_BYTES = 4096         # what of stderr a person gets to see
EVIDENCE_CHARS = 500             # of an error or a message in state, ledger, prompts
STEP_TIMEOUT_S = 5.0             # a short command in a container; it takes 0.12 s
REVIVAL_DELAYS_S = (3, 10, 30)   # before reviving a sandbox; a reset may be at work
MAX_LOSSES = 3                   # of the sandbox in a row, until it counts as unusable
MIN_SECRET_CHARS = 8             # a shorter value is no key, and would redact too much
KEYS = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")    # kept from environments
COMMAND_TIMEOUT_S = 120.0        # git, docker: anything that is not the agent
PROBE_TIMEOUT_S = 20.0           # one probe of `check`
SLOW_TIMEOUT_S = 3600.0          # the sandbox image, a large repository
GATE_TIMEOUT_S = 900.0           # a `**Verify:**` command
TELEMETRY_CLOSE_S = 1.0          # what a dead backend may cost at the end (promise 9)
LIMIT_MARGIN_S = 60.0            # after a usage limit's reset, before the next call
MAX_QUESTIONS = 5                # per task
NOTIFY_TIMEOUT_S = 15.0          # one notifier; slower ones are given up
LONG_WAIT_S = 600.0              # a wait that somebody is told of
PIPE_BYTES = 1 << 20             # of a pipe to an agent; Linux's unprivileged maximum
PR_SET_CHILD_SUBREAPER = 36      # linux/prctl.h
BUNDLED = "refs/orchestrator/bundled"  # what a bundle for `fetch` holds
MARK = "KTRDR_SANDBOX"           # environment variable that proves whose a process is
CURED = "it is put right"        # what a person answers when the API refused to work
PASSED_BY_HAND = "passed, I checked"   # a person's word that decides an E2E scenario
MISSING_SESSION = "missing_session"    # the rule that a new session cures

class ExitCode(enum.IntEnum):
    """What the shell, cron and scripts rely on (sysexits.h where it has a word)."""
    OK = 0
    FAILED = 1                   # a task, a loop, E2E, the money limit
    USAGE = 2                    # usage, plan, settings or state
    NEEDS_HUMAN = 3              # a question is parked, or nobody is logged in
    LOCKED = 4                   # already running
    SANDBOX = 5                  # unusable
    INTERNAL = 70                # a bug in this program
    TRY_LATER = 75               # an outage or a usage limit outlasted the wait
    INTERRUPTED, TERMINATED = 130, 143

class OrchestratorError(Exception):
    """A failure the user can act on: printed as message and hint, no traceback."""
    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

class UsageError(OrchestratorError):
    """Arguments, a setting or the plan cannot be carried out as written."""
    exit_code = ExitCode.USAGE

class StateError(OrchestratorError):
    """State could not be read or written; the file on disk was left as it is."""
    exit_code = ExitCode.USAGE

class LockHeldError(OrchestratorError):
    """Another live process runs this milestone or uses this sandbox."""
    exit_code = ExitCode.LOCKED

class SandboxError(OrchestratorError):
    """The sandbox did not do what it was asked to."""
    exit_code = ExitCode.SANDBOX

class SandboxLostError(SandboxError):
    """It went away, but is back, empty of processes: what ran is to be done again."""

class OutageError(OrchestratorError):
    """The API stayed unavailable longer than the run may wait."""
    exit_code = ExitCode.TRY_LATER

class Interrupted(OrchestratorError):
    """SIGINT, SIGTERM or SIGHUP arrived; everything started has been ended."""
    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}",
                         hint="the same command goes on from here")
        self.by_hand = signal_number == signal.SIGINT
        self.exit_code = ExitCode.INTERRUPTED if self.by_hand else ExitCode.TERMINATED

# ==== 2. Settings ============================================== [vocabulary]
def _setting(default: Any, help: str, minimum: float = 0, maximum: float = 1e9,
             choices: tuple[str, ...] = ()) -> Any:
    """A field of Config; more seconds than 1e9 would overflow a timestamp."""
    return field(default=default, metadata={
        "help": help, "minimum": minimum, "maximum": maximum, "choices": choices})

@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting, resolved. One field is one flag, variable and ini key."""
    state_dir: Path = _setting(Path("state"), "where state, ledger, transcripts live")
    sandbox: str = _setting("docker", "where to work", choices=("docker", "local"))
    compose_files: str = _setting("sandbox/docker-compose.yml",
                                  "the sandbox's compose files, separated by ':'")
    repo: str = _setting(".", "repository to work on: a folder, or a URL (docker)")
    key_by: str = _setting("descriptor", "how the agent gets its API key (docker)",
                           choices=("descriptor", "environment", "gateway"))
    base: str = _setting("HEAD", "the commit a new milestone starts from")
    claude: str = _setting("claude", "the Claude Code command, as the sandbox finds it")
    model: str = _setting("", "model for the agent; empty: the CLI's own default")
    max_turns: int = _setting(50, "turns of one agent call", 1)
    max_attempts: int = _setting(3, "attempts per task", 1)
    max_cost_usd: float = _setting(0.0, "money for the whole milestone; 0: no limit")
    task_timeout_s: float = _setting(3600.0, "seconds for one agent call", 1)
    idle_timeout_s: float = _setting(900.0, "seconds an agent may stay silent", 1)
    error_similarity: float = _setting(0.8, "0..1, two errors this alike are one", 0, 1)
    outage_delays_s: tuple[float, ...] = _setting(
        (30, 60, 120, 300, 600), "seconds to wait before each retry of an outage")
    on_question: str = _setting("park", "if you're away", choices=("park", "recommend"))
    notify: str = _setting("", "where you are told", choices=("", "desktop"))
    notify_command: str = _setting("", "a shell command that gets news as JSON, stdin")
    notify_url: str = _setting("", "where news go as a JSON post (Slack, Discord, ...)")
    limit_wait_s: float = _setting(21600.0, "longest wait for a usage limit to reset")

SETTINGS = dataclasses.fields(Config)

def setting_key(name: str) -> str:
    return name.removesuffix("_s")       # people write no unit

def setting_flag(name: str) -> str:
    return "--" + setting_key(name).replace("_", "-")

def setting_value(setting: dataclasses.Field[Any], text: str, source: str) -> Any:
    """What a person wrote, in the type of the default. Raises UsageError."""
    kind: Any = type(setting.default)
    help, low, high, choices = setting.metadata.values()
    try:
        value: Any = (tuple(map(float, re.split(r"[,\s/]+", text.strip())))
                      if kind is tuple else kind(text))
        numbers = value if kind is tuple else (value,) if kind in (int, float) else ()
        if all(low <= n <= high for n in numbers) and (
                not choices or value in choices):
            return value
        problem = " or ".join(choices) if choices else f"in {low:g}..{high:g}"
    except ValueError:
        problem = "a whole number" if kind is int else "a number"
    raise UsageError(f"{source}: {text!r} is not {problem}",
                     hint=f"{setting_flag(setting.name)} takes {help}")

def resolve_config(
    flags: Mapping[str, str | None], environ: Mapping[str, str],
    file: Mapping[str, str], *, file_name: str = "orchestrator.ini",
) -> tuple[Config, dict[str, str]]:
    """Merge flag > environment > file > default; second: where each value came from.
    Raises UsageError for unknown variables and keys and for bad values, used or not."""
    ours, keys = "ORCHESTRATOR_", {setting_key(s.name): s for s in SETTINGS}
    written = [(f"{file_name} {key}", key, text) for key, text in file.items()]
    written += [(f"environment {name}", name.removeprefix(ours).swapcase(), text)
                for name, text in environ.items() if name.startswith(ours)]
    written += [(setting_flag(name), setting_key(name), text)
                for name, text in flags.items() if text is not None]
    values, sources = dict[str, Any](), {s.name: "default" for s in SETTINGS}
    for source, key, text in written:        # the last word wins
        if key not in keys:
            raise UsageError(f"{source}: unknown setting",
                             hint=f"known: {', '.join(keys)}")
        name = keys[key].name
        values[name], sources[name] = setting_value(keys[key], text, source), source
    return Config(**values), sources

# ==== 3. Data model ============================================ [vocabulary]
E2E_ID = "e2e"                   # of the scenario, which stands among the tasks

class Mark(enum.StrEnum):
    """What a task's heading says about it: `[x]`, DONE / ~~struck~~, DEFERRED."""
    NONE, DONE, SKIPPED = "", "done", "skipped"

@dataclass(frozen=True, slots=True)
class Task:
    """One task section. Lines are 1-based, in the plan file, both ends included;
    `text` is as written, heading included; `gates` the commands under `**Verify:**`."""
    id: str
    title: str
    line: int
    end_line: int
    text: str
    type: str = ""
    files: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    mark: Mark = Mark.NONE
    timeout_s: float | None = None
    model: str = ""

    @property
    def sha256(self) -> str:     # tells an edited task from an untouched one
        return hashlib.sha256(self.text.encode()).hexdigest()

@dataclass(frozen=True, slots=True)
class Problem:
    """Something about the plan that a person should see; `line` is 1-based."""
    line: int
    message: str
    hint: str = ""

@dataclass(frozen=True, slots=True)
class Plan:
    """A parsed plan; with `errors` it must not be run. `context` precedes the tasks."""
    path: Path
    milestone: str
    title: str
    sha256: str
    branch: str = ""
    tasks: tuple[Task, ...] = ()
    e2e: Task | None = None      # the scenario, with the id `e2e`
    context: str = ""
    warnings: tuple[Problem, ...] = ()
    errors: tuple[Problem, ...] = ()

    @property
    def steps(self) -> tuple[Task, ...]:
        return (*self.tasks, self.e2e) if self.e2e else self.tasks

class Ended(enum.StrEnum):
    """Why we stopped reading an agent. `exit`: it ended by itself; `grace`: hung after
    its result event, which counts; `stopped`: by a signal to us; `lost`: never told."""
    EXIT, GRACE, STOPPED, LOST = "exit", "grace", "stopped", "lost"
    TIMEOUT, IDLE = "timeout", "idle"

@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and money of one call, as the CLI reports them."""
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    cost_usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Usage(*map(sum, pairs))
    @property
    def tokens(self) -> dict[str, int]:
        return {k: n for k, n in dataclasses.asdict(self).items() if k != "cost_usd"}

@dataclass(frozen=True, slots=True, kw_only=True)
class AgentResult:
    """What one `claude -p` left behind, before any judgement. `usage` and `models` are
    of this call alone, also in a resumed session, whose own counters go on."""
    ended: Ended = Ended.LOST
    exit_code: int | None = None
    has_result: bool = False     # a result event arrived; `text` is its message
    session_id: str = ""
    text: str = ""
    structured: Mapping[str, Any] | None = None
    asked: Mapping[str, Any] | None = None   # its last AskUserQuestion, never answered
    is_error: bool = False
    subtype: str = ""
    terminal_reason: str = ""
    api_error: str = ""
    api_error_status: int | None = None
    errors: tuple[str, ...] = ()
    limit_resets_at: float | None = None   # seconds since the epoch
    usage: Usage = Usage()
    models: Mapping[str, Usage] = field(default_factory=dict)
    turns: int = 0
    duration_s: float = 0.0
    stderr_tail: str = ""
    events: int = 0
    bad_lines: int = 0           # no JSON object, or too long to decode

@dataclass(frozen=True, slots=True)
class Question:
    """What a person is asked. An empty recommendation: the agent had none."""
    text: str
    options: tuple[str, ...] = ()
    recommendation: str = ""

class VerdictStatus(enum.StrEnum):
    COMPLETED, FAILED, NEEDS_HUMAN = "completed", "failed", "needs_human"

@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement and its reason: the rule that decided and what it saw."""
    status: VerdictStatus
    rule: str
    evidence: str
    question: Question | None = None

class OutageKind(enum.StrEnum):
    """What cures it: waiting, the limit's reset, a person (login, credit, model)."""
    RETRY, LIMIT, PERSON = "retry", "limit", "person"

@dataclass(frozen=True, slots=True)
class Outage:
    """The API cannot answer now. Never charged to a task."""
    kind: OutageKind
    reason: str
    resets_at: float | None = None   # seconds since the epoch

class TaskStatus(enum.StrEnum):
    """`running` is also what a killed run leaves behind."""
    PENDING, RUNNING, COMPLETED = "pending", "running", "completed"
    FAILED, NEEDS_HUMAN = "failed", "needs_human"

OVER = (TaskStatus.COMPLETED, TaskStatus.FAILED)

@dataclass(frozen=True, slots=True)
class Attempt:
    """One finished agent call and what was made of it, as state and ledger keep it."""
    number: int
    started_at: str              # RFC 3339, UTC
    duration_s: float
    ended: str
    status: str
    rule: str
    evidence: str
    session_id: str
    turns: int
    cost_usd: float

@dataclass(frozen=True, slots=True)
class TaskRecord:
    """Where one task stands. `started` is saved before each attempt, so a crash
    counts; `base` and `checkpoint` are the commits before and after the task."""
    title: str = ""
    sha256: str = ""
    status: TaskStatus = TaskStatus.PENDING
    started: int = 0
    attempts: tuple[Attempt, ...] = ()
    question: Question | None = None
    answer: str = ""
    reason: str = ""
    base: str = ""
    checkpoint: str = ""

@dataclass(frozen=True, slots=True)
class Wait:
    """What a run waits for: `until` is RFC 3339, UTC."""
    reason: str
    until: str

@dataclass(frozen=True, slots=True)
class RunState:
    """All that survives a crash. Immutable: each step returns a new state."""
    milestone: str
    plan_path: str
    plan_sha256: str
    branch: str
    sandbox: str                 # the kind it was started in
    started_at: str
    updated_at: str = ""
    base: str = ""               # the commit the milestone started from
    head: str = ""               # the latest checkpoint
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)
    wait: Wait | None = None
    cost_usd: float = 0.0

    def record(self, task_id: str) -> TaskRecord:
        return self.tasks.get(task_id, TaskRecord())
    def updated(self, task_id: str, **changes: Any) -> RunState:
        new = dataclasses.replace(self.record(task_id), **changes)
        return dataclasses.replace(self, tasks={**self.tasks, task_id: new})

# ==== 4. Plan parser ================================================= [pure]
# The format for people: docs/plan-format.md. Only Task and Problem count from line 1.

CONTEXT_CHARS = 8000             # of the prose before the first task, of an item
_HEAD_CHARS = 500                # of a line are matched; keeps every expression linear
_RULE = " \t-*_"                 # a line of these alone is a rule or blank
_FRONT_MATTER = re.compile(      # each line can be matched in one way only: linear
    r"---[ \t]*\n(?=[\w-]+:)(?:milestone:([^#\n]*+).*\n|(?!##|milestone:).*\n)*?"
    r"---[ \t]*\n")
_UNSAFE = re.compile(r"(?:[^\w./+#-]+\.*|\.\.+|/[/.]+)+", re.ASCII)   # in a name
# Atomic: with backtracking "Task 1.1 Complete: x" becomes task 1 ". 1 Complete".
_ID = (r"(?>(?:[A-Za-z]{1,4}[.-]?)?\d+[A-Za-z]?"
       r"(?:[.-](?:[A-Za-z]{0,4}\d+[A-Za-z]?|[A-Z]{1,4})(?!\w))*)(?!\w)")
_WORD = r"(?:Task|TASK|task)(?:[\s#-]{1,3}|(?=\d))"
_TASK = re.compile(              # marks and a (tag) may stand before the separator
    rf"{_WORD}({_ID})(?:\s*(?:\[[^\]]*\]|[^\w\s:：—–,.()\[\]/&+~-]))*"
    r"(?:\s*\([^()]*\)(?=\s*[:：—–]))?\s*(?:[:：—–]|(?:--?|[,.])(?=\s))(.*)")
_SEVERAL = re.compile(
    rf"(?:Task|TASK|task)(?:[sS]\s+{_ID}.*[:：—–]|[\s#-]+(?:\d[\d.]*\.\d+-\d+\.\d|{_ID}"
    rf"\s*(?:[-–—,&+/~]|to|and)\s*(?:Task )?(?=\d){_ID}\s*(?:[:：—–]|[,.-]\s|$)))")
_MENTION = re.compile(rf"(?:.*\(Tasks?\s|{_WORD})({_ID})(.*)")
_BOLD_TASK = re.compile(r"[^#]{0,8}\*\*(Task.*)")
_NEAR_MISS = re.compile(r"\s*(?:[-*+]\s+\[.\]|(?:##+|\*\*)\W*"
                        rf"(?:(?:Task|Subtask|Story|Step|任務|任务)\s*)?{_ID}\W)")
_HEADING = re.compile(           # "##Task 1.1: x" is a slip, "#!/bin/sh" is none
    r" {0,3}(#{1,6})(?:[ \t]+|$|(?=\W{0,9}(?:Task|TASK)))(.*?)(?:[ \t]#+)?[ \t]*$")
_DECORATION = re.compile(r"(?:[^\w\[]|\[[^\]]*\]|\d[\d.)]*\s)*")
_NOISE = re.compile(r"\[[ xX~✓✔]?\]|[✅☑✔✓☐⬜⏳🔄❌🚧]\ufe0f?|\((?i:completed?|done)\)")
_STATUS = r".*(?:[(\[]\W*(?i:{0})\W*[)\]]|(?:[(\[*]|\s[—–-]+\s)\W*(?:{0})\b)"
_MARKS = {                       # best first
    Mark.SKIPPED: re.compile(r"\W*~~|" + _STATUS.format(
        "REMOVED|DEFERRED|SKIP(?:PED)?|SUPERSEDED|CONSOLIDATED|MOVED")),
    Mark.DONE: re.compile(r"(?!.*(?i:in progress))(?:.*(?:\[[xX✓✔]\]|[✅✔☑])|"
                          + _STATUS.format("DONE|COMPLETED?") + ")")}
_BLOCK = re.compile(             # opens or closes a fence, or opens a comment
    r"((?:[ \t>]|[-*+][ \t]|\d+[.)][ \t])*+)(?:(`{3,}+|~{3,}+)([^`]*)$|<!--(?!.*-->))")
_SHELLS = ("", "bash", "sh", "shell", "zsh")   # languages of a script
_ITEM = re.compile(r"([ \t]*)(?:[-*+]|\d+[.)])\s+(\[[ xX~✓✔]\]\s*)?(.*)")
_LABEL = re.compile(             # "**Name:** value", "**Name**: value", "# Name"
    r"\s*(?:(?:[-*+]|\d+[.)])\s+(?=\*\*))?(?:\*\*|#+\s+|(?=acceptance[^*:：]*[:：]))(?:"
    r"(?P<criteria>acceptance(?: criteria| tests)?|success criteria|done when"
    r"|definition of done|验收标准|驗收標準)|(?P<verify>verify)|(?P<type>type)"
    r"|(?P<files>files?(?:\(s\))?(?: to \w+| \w+ed)?|文件\w*)|(?P<timeout>timeout)"
    r"|(?P<model>model)|(?P<branch>branch))(?=\s*(?:[:：*(]|$))[^*:：]*"
    r"(?:[:：]\s*(?:\*\*)?|\*\*\s*(?:[:：]|$|(?=\())|$)", re.IGNORECASE)
_CODE = re.compile(r"(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)")
_COMMANDS = re.compile(rf"(?:[\s,;&]*+(?:(?:and|then)\b\s*+)?{_CODE.pattern})*")
_TIME = re.compile(r"(\d{1,9}) *(?:s(?:ec\w*)?|([mh])(?:in\w*|ours?)?)?")
_E2E = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (     # best first
    r"(?:E2E|end[- ]to[- ]end) (?:tests?|scenario)\b",
    r".*\b(?:E2E|end[- ]to[- ]end)\b.*\b(?:tests?|scenario|(?:valid|verific)ation)\b",
    r"(?:.*: )?(?:(?:milestone|phase) [\w.]+ |final )?(?:valid|verific)ation"
    r"(?: commands.*| \w+(?: \(.*)?)?$|manual (?:test|smoke)|post-completion"))

@dataclass(frozen=True, slots=True)
class _Doc:
    """The file in one reading of its fences."""
    lines: Sequence[str]
    shown: Sequence[str]         # the same, but fences and comments are blank
    fences: Mapping[int, int]    # first and last line of each
    unclosed: Sequence[int]      # first lines of the fences and comments left open
    headings: Sequence[tuple[int, str, Task]]   # level, text; its section, id if a task

    @property
    def tasks(self) -> list[Task]:
        return [section for _, _, section in self.headings if section.id]

def decode_plan(data: bytes, *, path: Path) -> str:
    """The plan's text. Raises UsageError with path:line unless it is clean UTF-8."""
    try:                         # a NUL is valid UTF-8, but no text
        return data.replace(b"\0", b"\xff").decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: byte 0x{data[error.start]:02x}",
                         hint="save as UTF-8") from None

def _read(lines: Sequence[str], *, nested: bool) -> _Doc:
    """Find fences and headings. `nested`: an info string inside a fence opens one more,
    against CommonMark; either policy alone loses tasks of real plans."""
    shown, fences = list(lines), dict[int, int]()
    stack: list[tuple[int, re.Match[str]]] = []
    for i, line in enumerate(lines):
        block = _BLOCK.match(line) if re.search("```|~~~|<!--", line) else None
        opener = stack[-1][1] if stack else None
        shown[i] = "" if opener or block else line
        if not opener:
            stack += [(i, block)] if block else []
        elif not opener[2]:      # a comment
            stack = [] if "-->" in line else stack
        elif block and block[2] and block[2].startswith(opener[2]):
            if block[3].strip():
                stack += [(i, block)] if nested else []
            elif not block[1].strip(" \t>"):
                fences[stack.pop()[0]] = i
    headings: list[tuple[int, str, Task]] = []
    ends = [len(lines)] * 7      # by level; 0: tasks, which end every section
    for i, line in reversed([*enumerate(shown)]):
        if found := _HEADING.match(line[:_HEAD_CHARS]):
            level = len(found[1])
            plain = _DECORATION.sub("", re.sub(r"\*\*|~~|`", "", found[2]), count=1)
            task = None if _SEVERAL.match(plain) else _TASK.match(plain)
            title = " ".join(_NOISE.sub(" ", task[2] if task else plain).split())
            mark = (m for m, pattern in _MARKS.items() if pattern.match(found[2]))
            end = min(ends[:level + 1])
            while end > i + 1 and not lines[end - 1].strip(_RULE):
                end -= 1
            section = Task(task[1] if task else "", title.rstrip(" -—–"), i + 1, end,
                           "", mark=next(mark, Mark.NONE))
            headings.append((level, plain, section))
            ends[0 if task else level] = i
    return _Doc(lines, shown, fences, [at for at, _ in stack], headings[::-1])

def _fence_problems(doc: _Doc, other: _Doc) -> Iterator[Problem]:
    """What is doubtful about a reading; two plausible lists of tasks are an error."""
    mine, others = ({task.line: task.id for task in d.tasks} for d in (doc, other))
    if differing := mine.keys() ^ others.keys():
        is_open = not doc.unclosed and not other.unclosed and all(
            len(set(ids.values())) == len(ids) for ids in (mine, others))
        yield Problem(
            min(differing), "a task or not? nested fences can be read in two ways",
            "give the outer fence four backticks, ````" if is_open else "")
    for at in doc.unclosed[:1]:
        below = _read(doc.lines[at + 1:], nested=False).tasks
        yield Problem(at + 1, f"this never ends: {doc.lines[at].strip()[:80]}",
                      "close it above the tasks" if below else "")

def _labels(doc: _Doc, start: int, end: int) -> list[tuple[str, list[str]]]:
    """Labels, by a group of _LABEL, "script" or "", with value and items below."""
    labels, indent = [("", [""])], 0
    for i in range(start, end):
        line, (kind, texts) = doc.shown[i], labels[-1]
        found, item = _LABEL.match(line), _ITEM.match(line)
        if i in doc.fences and kind == "verify":
            is_script = doc.lines[i].strip(" \t>`~").lower() in _SHELLS
            alone = len(texts) == 1 and not texts[0].startswith("`")
            script = textwrap.dedent("\n".join(doc.lines[i + 1:doc.fences[i]]))
            labels.append(("script" if is_script and alone else "", [script]))
        elif found:
            labels.append((found.lastgroup or "", [line[found.end():].strip()]))
        elif not line.strip(_RULE):
            continue
        elif item and (len(texts) == 1 or len(item[1]) == indent):
            indent = len(item[1])
            texts.append(item[3].strip())
        elif len(texts) > 1 and line[0] in " \t":
            texts[-1] = f"{texts[-1]} {line.strip()}"[:CONTEXT_CHARS]
        elif len(texts) > 1 or kind == "verify" or line[0] in "*#":
            labels.append(("", [""]))
    return labels

def _gates(labels: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """The code that a `**Verify:**` and its items begin with; the scripts below one."""
    for kind, texts in labels:
        for text in texts if kind == "verify" else ():
            if head := _COMMANDS.match(text):
                yield from (code[2].strip() for code in _CODE.finditer(head[0]))
        if kind == "script":
            yield texts[0].strip("\n")

def _task(doc: _Doc, section: Task) -> Task:
    """The section with what is labelled in it."""
    labels = _labels(doc, section.line, section.end_line)
    value = {kind: texts[0] for kind, texts in reversed(labels)}
    files = (word for kind, texts in labels if kind == "files" for text in texts
             for part in text.split("`")[1::2] or text.split(",")
             for word in part.split()[:1] if "." in word or "/" in word)
    criteria = (text for kind, texts in labels if kind == "criteria"
                for text in texts[1:] or texts)
    time = _TIME.fullmatch(value.get("timeout", "").strip("` ").lower())
    timeout_s = int(time[1]) * {"m": 60, "h": 3600}.get(time[2], 1) if time else 0
    return dataclasses.replace(
        section, text="\n".join(doc.lines[section.line - 1:section.end_line]),
        type=value.get("type", ""), model=value.get("model", "").strip("` "),
        timeout_s=timeout_s if "timeout" in value else None,
        files=tuple(dict.fromkeys(files)), criteria=tuple(filter(None, criteria)),
        gates=tuple(filter(None, _gates(labels))))

def _e2e(doc: _Doc) -> Task | None:
    """The section outside the tasks whose heading says most clearly that it is one."""
    inside = {i for task in doc.tasks for i in range(task.line, task.end_line + 1)}
    outside = [h for h in doc.headings if h[0] > 1 and h[2].line not in inside]
    for section in (h[2] for p in _E2E for h in outside if p.match(h[1])):
        body = [line for line in doc.lines[section.line:section.end_line]
                if line.strip(_RULE)]
        boxes = [line for line in body if (item := _ITEM.match(line)) and item[2]]
        if 2 * len(boxes) < len(body):         # no mere list of boxes to tick
            return dataclasses.replace(_task(doc, section), id=E2E_ID)
    return None

def _problems(doc: _Doc, tasks: Sequence[Task], name: str) -> Iterator[Problem]:
    lines = {task.id: task.line for task in reversed(tasks)}
    levels = {level for level, _, section in doc.headings if section.id}
    mentions = [(s.line, level, text) for level, text, s in doc.headings if not s.id]
    mentions += [(at, 0, bold[1]) for at, line in enumerate(doc.shown, 1)
                 if (bold := _BOLD_TASK.match(line))]
    for at, level, text in mentions:
        mention = _MENTION.match(text)
        if level and _SEVERAL.match(text):
            yield Problem(at, f"several tasks in one: {text[:80]}", "split it")
        elif mention and not {mention[1], mention[1].partition("-")[0]} & lines.keys():
            hint = f"write ## Task {mention[1]}: {mention[2].strip() or 'Title'}"
            yield Problem(at, f"not a task heading: {text[:80]}",
                          hint if level in levels else "")
    misses = ((at, f"no task heading; the nearest miss: {line[:80]}") for at, line
              in enumerate(doc.shown, 1) if _NEAR_MISS.match(line[:_HEAD_CHARS]))
    at, missing = next(misses, (1, "no task heading"))
    bare = ", ".join(task.id for task in tasks if not task.criteria)
    checks: list[tuple[int, object, str, str]] = [
        (at, not tasks, missing, "write ## Task 1.1: Title"),
        (1, bare, f"no acceptance criteria: {bare[:80]}", ""),
        (1, tasks and all(t.mark for t in tasks), "every task is marked done", ""),
        (1, re.search(r"handoff|summary|report|status|complet(?:e|ion)\b", name, re.I),
         f"sounds like a report, not like a plan: {name[:80]}", "")]
    for task in tasks:
        at, first = task.line, lines[task.id]
        checks += [
            (at, first != at, f"{task.id} is also in line {first}", "use another id"),
            (at, not task.title, "no title", f"write ## Task {task.id}: Title"),
            (at, task.timeout_s == 0, "bad **Timeout:**", "write 600, 90s, 15m or 2h"),
            (at, not task.gates and "**Verify" in task.text, "Verify: no command", "")]
    yield from (Problem(at, text, hint) for at, wrong, text, hint in checks if wrong)

def parse_plan(text: str, *, path: Path) -> Plan:
    """Turn plan markdown into a Plan. Never raises on content. Inside this section a
    hint makes a Problem an error: a plan with errors must not be run."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    front = _FRONT_MATTER.match(text)
    head = front[0] if front else ""
    lines = ("\n" * head.count("\n") + text[len(head):]).split("\n")
    doc, other = _read(lines, nested=True), _read(lines, nested=False)
    if doc.unclosed:             # nesting is believed only if every fence ends
        doc, other = other, doc
    tasks = tuple(_task(doc, section) for section in doc.tasks)
    e2e = _e2e(doc)
    start = min((s.line - 1 for s in (*tasks[:1], e2e) if s), default=len(lines))
    titles = ((text, s.line) for level, text, s in doc.headings if level == 1)
    title, after = next((t for t in titles if t[1] <= start), (path.stem, 0))
    milestone = (front and front[1] or path.stem).replace("/", "-")
    branch = " ".join(v[0] for kind, v in _labels(doc, 0, start) if kind == "branch")
    branch = "".join((branch.split("`")[1::2] or branch.split())[:1])
    milestone, branch = (_UNSAFE.sub("-", name.strip())[:100].strip("-./")
                         for name in (milestone, branch))
    problems = [*_fence_problems(doc, other),
                *_problems(doc, tasks, f"{path.name}: {title}")]
    problems.sort(key=lambda problem: problem.line)
    return Plan(
        path=path, title=title, tasks=tasks, e2e=e2e, branch=branch,
        milestone=milestone or "plan",
        sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        context="\n".join(lines[after:start]).strip()[:CONTEXT_CHARS],
        warnings=tuple(problem for problem in problems if not problem.hint),
        errors=tuple(problem for problem in problems if problem.hint))

def plan_report(plan: Plan) -> dict[str, Any]:
    """What `check PLAN --json` prints."""
    report = dataclasses.asdict(plan)
    for part in (report, *report["tasks"], *report["warnings"]):
        for name in ("path", "sha256", "context", "text", "timeout_s", "model", "hint"):
            part.pop(name, None)
    if e2e := plan.e2e:
        report["e2e"] = {"heading": e2e.title, "line": e2e.line, "end_line":
                         e2e.end_line, "text": e2e.text, "gates": e2e.gates}
    return report

# ==== 5. Prompts ===================================================== [pure]
def _schema(required: str, **properties: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """JSON schema of a report; a property given as words is a text so described."""
    return {"type": "object", "required": required.split(), "properties": {
        name: {"type": "string", "description": told} if isinstance(told, str) else told
        for name, told in properties.items()}}
_TEXTS = {"type": "array", "items": {"type": "string"}}
VERDICT_SCHEMA = _schema(
    "status summary", status={
        "type": "string", "enum": [status.value for status in VerdictStatus],
        "description": "completed: every acceptance criterion is met and checked. "
        "failed: it could not be done. needs_human: only a person can decide or "
        "provide what is missing (a product decision, a secret, a contradiction)."},
    summary="what was done, one to three sentences",
    error="failed: the decisive error, verbatim",
    question="needs_human: one question, clear to who has not seen your work",
    options={**_TEXTS, "description": "needs_human: the possible answers, complete"},
    recommendation="needs_human: the option that you would take, and why")
E2E_SCHEMA = _schema(
    "status", status={"type": "string", "enum": ["passed", "failed", "unclear"]},
    diagnosis="failed or unclear: what is wrong, where",
    options=_TEXTS, recommendation="your own choice of the options",
    steps={**_TEXTS, "description": "for each step: what you ran, what you saw"})
_TASK_RULES = """\
You work alone in a sandbox; nobody is watching and nobody can be asked while you work.
Do this one task and nothing else. Do not touch the plan file, and do not weaken, skip
or delete tests to get a result. Commit nothing: your changes are committed for you.
Decide details as a careful senior engineer would, and say what you chose. needs_human
is for what only a person can give: a product decision, a secret, consent to what cannot
be undone, a way out of a contradiction. An offer after finished work is no question.
Check every acceptance criterion by running something before you report completed.
End with your report. Without a structured report, end your last message with:
STATUS: completed | failed | needs_human
SUMMARY: ... | ERROR: ... | QUESTION: ... OPTIONS: ... RECOMMENDATION: ..."""
_E2E_RULES = """\
The tasks of this milestone are done. Carry out the scenario below exactly as written,
step by step, and report what you ran and saw. Change no file: you judge, do not fix.
Say passed only when every step did what the scenario expects.

End with your report. Without a structured report, end your last message with:
E2E_STATUS: passed | failed | unclear
DIAGNOSIS: ..."""

def shortened(text: str, limit: int = EVIDENCE_CHARS) -> str:
    """The text, its middle cut out when it is longer than `limit` characters."""
    text, half = text.strip(), (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"

def _prompt(first_line: str, rules: str, *sections: tuple[str, str]) -> str:
    # Lone surrogates, in an agent's error say, would stop every attempt after it.
    told = (f"## {title}\n\n{body.strip()}" for title, body in sections if body.strip())
    whole = "\n\n".join((first_line, rules, *told)) + "\n"
    return whole.encode(errors="replace").decode()

def task_prompt(
    plan: Plan, task: Task, record: TaskRecord, *, max_attempts: int, guidance: str,
) -> str:
    """First prompt of an attempt; `guidance` is what a person says besides."""
    asked = record.question.text if record.question else ""
    order = (f"- Task {t.id}: {t.title}{' (this one)' if t is task else ''}"
             for t in plan.tasks)
    return _prompt(
        f"Task {task.id} of milestone {plan.milestone}: {task.title} "
        f"(attempt {record.started} of {max_attempts})", _TASK_RULES,
        ("The task", task.text),
        ("These commands must succeed afterwards; they will be run for you",
         textwrap.indent("\n".join(task.gates), "    ")),
        ("Earlier attempts failed; their changes were undone", "\n".join(
            f"{a.number}. {a.evidence}" for a in record.attempts
            if a.status == VerdictStatus.FAILED)),
        ("A person answered an earlier question",
         f"{asked}\nAnswer: {record.answer}" if record.answer else ""),
        ("A person adds", guidance),
        (f"The milestone: {plan.title}", f"{plan.context}\n\n" + "\n".join(order)))

def answer_prompt(plan: Plan, task_id: str, title: str, answer: str) -> str:
    return _prompt(f"Answer for task {task_id} of milestone {plan.milestone}: {title}",
                   f"A person answered your question:\n\n{answer}\n\n"
                   "Go on with the task and end with your report as before.")

def e2e_prompt(plan: Plan, scenario: Task, run: int) -> str:
    return _prompt(f"E2E scenario of milestone {plan.milestone} (run {run})",
                   _E2E_RULES, ("The scenario", scenario.text))

# ==== 6. Agent stream ================================================ [pure]
END_EVENT = "orchestrator_end"   # our own last line of a transcript
_SUMMARY_KEYS = ("command", "file_path", "notebook_path", "pattern", "path", "url",
                 "query", "description", "prompt", "skill", "status")
_TOKEN_KINDS = ("input", "output", "cacheReadInput", "cacheCreationInput")
# Events that hold nothing we decide on are recognised by their first bytes and not
# decoded: json.loads on every line is most of what a decoder costs.
_UNREAD = (b'{"type":"user"', b'{"type":"stream_event"')

def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

def _number(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return value if good and 0 <= value < 1e15 else 0

def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()

def json_objects(lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    """What the lines hold; one that is torn, or no object, is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if found := _object(json.loads(line.decode("utf-8", "replace"))):
                yield found

def tool_use(block: Mapping[str, Any]) -> str:
    """A tool call on one short line: its name and its most telling argument."""
    texts = (_text(_object(block.get("input")).get(key)) for key in _SUMMARY_KEYS)
    told = f"{_text(block.get('name'))} {next(filter(None, texts), '')[:400]}"
    line = " ".join(re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", told).split())
    return line if len(line) <= 110 else f"{line[:107]}..."

def _usage(value: Any) -> Usage:
    raw = _object(value)
    n = [int(_number(raw.get(f"{kind}Tokens"))) for kind in _TOKEN_KINDS]
    return Usage(n[0], n[1], n[2], n[3], _number(raw.get("costUSD")))

def _with_result(seen: AgentResult, event: Mapping[str, Any]) -> AgentResult:
    """A resumed session's totals go on: what was used since is taken where told."""
    used, models = event.get("model_usage_since_last_result"), dict(seen.models)
    if not isinstance(used, dict):
        total = {"unknown": {"costUSD": event.get("total_cost_usd")}}
        used, models = _object(event.get("modelUsage", total)), {}
    for model, raw in used.items():
        models[model] = models.get(model, Usage()) + _usage(raw)
    status, structured = event.get("api_error_status"), event.get("structured_output")
    return dataclasses.replace(
        seen, has_result=True, text=_text(event.get("result")),
        session_id=_text(event.get("session_id")) or seen.session_id,
        structured=structured if isinstance(structured, dict) else None,
        is_error=event.get("is_error") is True, subtype=_text(event.get("subtype")),
        terminal_reason=_text(event.get("terminal_reason")),
        api_error=_text(event.get("api_error")) or _text(event.get("api_error_type")),
        api_error_status=status if isinstance(status, int) else None,
        errors=tuple(filter(None, map(_text, _list(event.get("errors"))))),
        models=models, usage=sum(models.values(), Usage()),
        turns=int(_number(event.get("num_turns"))),
        duration_s=_number(event.get("duration_ms")) / 1000)

class Redactor:
    """Takes secrets out of a stream of bytes, cut anywhere."""
    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._secrets, self._held = secrets, b""

    def feed(self, data: bytes) -> bytes:
        """What can be told; a secret's start is held back until the end (no data)."""
        is_end, data = not data, self._held + data
        for secret in self._secrets:
            data = data.replace(secret, b"[redacted]")
        cut = len(data) - max((n for secret in self._secrets for n in range(len(secret))
                               if data.endswith(secret[:n]) and not is_end), default=0)
        data, self._held = data[:cut], data[cut:]
        return data

class StreamDecoder:
    """Fold a `--output-format stream-json` into an AgentResult; nothing makes it raise;
    a line of over MAX_LINE_BYTES is passed over."""
    def __init__(self) -> None:
        self._open = bytearray()              # a line that has not ended yet
        self.seen = AgentResult()             # what is known so far
        self._events = self._bad_lines = 0
        self._tools: list[str] = []

    def feed(self, data: bytes) -> Sequence[str]:
        """Take the next bytes, cut anywhere; return the tool calls seen in them."""
        self._tools = []
        for number, piece in enumerate(data.split(b"\n")):
            if number:
                self._line(self._open)
                self._open.clear()
            self._open += piece
            if len(self._open) > MAX_LINE_BYTES:
                self._open[32:] = b"\0"   # enough to know its kind; no JSON holds a NUL
        return self._tools

    def finish(self, stderr_tail: str = "") -> AgentResult:
        """The whole call. How it ended is told by our own last line."""
        self.feed(b"\n")
        return dataclasses.replace(self.seen, stderr_tail=stderr_tail,
                                   events=self._events, bad_lines=self._bad_lines)

    def _line(self, line: bytearray) -> None:
        if line.startswith(_UNREAD) or (line.startswith(b'{"type":"assistant"')
                                        and b'"type":"tool_use"' not in line):
            self._events += 1
        elif line.strip():
            try:
                value = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                value = None
            for event in value if isinstance(value, list) else [value]:
                if isinstance(event, dict):
                    self._event(event)
                else:
                    self._bad_lines += 1

    def _event(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        self._events += kind != END_EVENT
        if kind == "assistant":
            blocks = map(_object, _list(_object(event.get("message")).get("content")))
            calls = [block for block in blocks if block.get("type") == "tool_use"]
            self._tools += map(tool_use, calls)
            for call in calls:
                questions = _list(_object(call.get("input")).get("questions"))
                if call.get("name") == "AskUserQuestion" and questions:
                    asked = _object(questions[0])
                    self.seen = dataclasses.replace(self.seen, asked=asked)
        elif kind == "result":
            self.seen = _with_result(self.seen, event)
        elif kind == "rate_limit_event":
            info = _object(event.get("rate_limit_info"))
            resets_at = _number(info.get("resetsAt"))   # ms would be no date
            if info.get("status") == "rejected" and 0 < resets_at < 1e10:
                self.seen = dataclasses.replace(self.seen, limit_resets_at=resets_at)
        elif kind == END_EVENT:
            ended, code = _text(event.get("ended")), event.get("exit_code")
            self.seen = dataclasses.replace(
                self.seen, ended=Ended(ended) if ended in set(Ended) else Ended.LOST,
                exit_code=code if isinstance(code, int) else None,
                duration_s=_number(event.get("duration_s")) or self.seen.duration_s)
        elif session_id := _text(event.get("session_id")):
            self.seen = dataclasses.replace(self.seen, session_id=session_id)

# ==== 7. Verdict ===================================================== [pure]
_RETRY_HTTP = frozenset({408, 409, 425, 429})   # of the 4xx, those that waiting cures
_LIMIT = re.compile(r"(?i)(?:usage|hour|weekly|session)[ _]limit[ _]reached"
                    r"|hit your [\w -]{0,20}limit|out of (?:extra )?usage")
_PERSON = re.compile(
    r"(?i)/login\b|invalid api key|credit balance|selected model|prompt.{1,4}too.long"
    r"|certificate|_CERT|UNABLE_TO_VERIFY|API Error[^\n:]{0,60}: 40[0-7]\b")

def outage(result: AgentResult) -> Outage | None:
    """Tell an API that cannot answer from a task that failed; no result is none."""
    is_api = bool(result.terminal_reason in ("api_error", "prompt_too_long")
                  or result.api_error or result.api_error_status)
    is_older_cli = not (result.terminal_reason or result.subtype.startswith("error_"))
    if not (result.has_result and result.is_error and (is_api or is_older_cli)):
        return None
    text = result.text or "\n".join(result.errors)
    reason = shortened(text or result.api_error or result.terminal_reason)
    words = f"{result.terminal_reason} {result.api_error} {text}"
    status = result.api_error_status or 0
    if _LIMIT.search(words) or (status == 429 and result.limit_resets_at is not None):
        return Outage(OutageKind.LIMIT, reason, result.limit_resets_at)
    is_refused = 400 <= status < 500 and status not in _RETRY_HTTP
    if is_refused or (not status and _PERSON.search(words)):
        return Outage(OutageKind.PERSON, reason)
    return Outage(OutageKind.RETRY, reason) if is_api or "API Error" in text else None

_Report = tuple[str, Mapping[str, Any]]   # the rule that applied, the fields it read
_STATUS_WORD = re.compile(       # also `**Needs Human** - why`, `✅ Complete`
    r"[\W_]{0,9}(?:(?P<completed>completed?|done|success)|(?P<failed>fail(?:ed|ure)?)"
    r"|(?P<needs_human>blocked|needs[ _-]?human)|(?P<passed>pass(?:ed)?)"
    r"|(?P<unclear>unclear))[\W_]{0,9}(?:$|[-–—:(,.;])", re.I)
_KEY = re.compile(r"^[ \t>#*_`-]{0,8}((?i:(?:e2e[_ ])?status|question|options"
                  r"|recommendation)|[A-Z0-9_ ]{4,30})[*_` ]{0,4}:", re.M)
_RULER = re.compile(r"^[ \t]*(?:-{3}|`{3}|\*{3}|={3})", re.M)
_OPTION_END = re.compile(r"\n| ?[|;] ?|,? (?=[A-Da-d1-9][).] )")

def _word(fields: Mapping[str, Any]) -> str:
    found = _STATUS_WORD.match(_text(fields.get("status"))[:200])
    return (found and found.lastgroup) or ""

def _field(fields: Mapping[str, Any], *names: str) -> str:
    """The first of the fields that holds text; empty if none does."""
    texts = (shortened(_text(fields.get(name))) for name in names)
    return next(filter(None, texts), "")

def _block(text: str, status_key: str) -> dict[str, str]:
    """The last block of lines `KEY: value` that begins with `status_key`."""
    fields: dict[str, str] = {}
    _, *parts = _KEY.split(text)
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        key = name.strip(" _").lower().replace(" ", "_")
        fields = {} if key == status_key else fields
        fields[key] = _RULER.split(value, 1)[0].strip(" \t\r\n*_`")
    return {**fields, "status": fields.get(status_key, "")}

_TAIL_CHARS = 1500               # of prose and code: the part that decides
_EVEN = str.maketrans("’‘“”？؟", "''\"\"??")
_NOT_PROSE = re.compile(r"(?ms)\A.*</think[\w-]{0,80}>|^ *```.*?(?:^ *```|\Z)|`[^`\n]*`"
                        r"|\"[^\"\n]*\"|^(?: *>|RECOMMENDATION:)[^\n]*")
_SENTENCE = re.compile(r"(?m).+?(?:(?<=[^\d\s][.!?])(?=\s)|(?<=\?)(?=\w)|$)")
_CHOICE = re.compile(r"(?m)\[[A-Z0-9]\] ?\w[^\[\n/]+|^ *(?:[-*•]|\w{1,2}[.)]) +\S.*")
_QUESTION = re.compile(r"^(?!#|[Ww]hy ).{9,}[\w)\"'`\] ]\?[\"')\]_* ]*$")
_CHOOSES = re.compile(r"(?i)\b(?:wh(?:ich|at|ere|o)|how)\b.*\b(?:your?|I|we|should)\b"
    r"|^ready|\b(?:should (?!I|we)|proceed|begin|start|go (?:on|ahead)|(?<!to )or)\b")
_COURTESY = re.compile(r"(?i)^\W*(?:if|how about)\b|\b(?:any(?:thing| questions?)"
    r"|(?<!body )else|more|other|next|additional|too|again|sense|specific|commit)\b")
_REQUEST = re.compile(r"(?i)^(?:to [^,]{3,60}, |please |c\w+ you )?(?:choose|select"
    r"|pick|reply|say|type _+|tell me|give me|send|share|paste|provide|specify|clarify"
    r"|grant|approve|allow|confirm(?! that)|let me know (?:wh|how (?!it))\w*)\b"
    r"|\band (?:paste|send|tell me) (?!m)|\[(?-i:Y|N|[A-CE-W]|1)\]|[\[(]y ?/ ?n[\])]")
_NEEDS = r"\b(?:requires?|needs?|pending|a?wait\w*(?: on| for)?) "
_CONSENT = r"(?:approv\w+|permissions?|confirmation|authori\w+|credentials|decision)"
_HALTED = re.compile(            # nobody says so of finished work
    r"(?i)\bI(?:'ll|'d)? (?:\w+ )?(?:need|like) (?:(?!to)|to (?:see|know|have))\b"
    rf"|{_NEEDS}you(?:r| to)\b|\bI(?:'m| am)? (?:unable to|can.?.?t) (?:go|pro|con)"
    r"|^(?!I\b)[^,]+ and I'll|(?:once|when|after) (?:you(?!'re)|that)\b.*\bI('ll| can)"
    rf"|'s your call|(?:commit|push|edit|write)s?\b.{{,30}}{_NEEDS}(?:\w+ )?{_CONSENT}"
    r"|(?:^|still |\bI(?:'\w+| am| have)? (?:\w+ )?)(?:stopped|paused|blocked|stuck"
    rf"|waiting)(?! \w+s )|^(?:{_CONSENT}|action|.* (?:step|input)) (?:requir|need)ed")
_STUCK = re.compile(rf"(?i){_NEEDS}.{{,30}}{_CONSENT}|{_CONSENT}.{{,40}} (?:requir|need"
    r"|deni)ed|(?:^user|human|person|some(?:one|body)) .{,25}(?:needs? to|must) (?!alr)"
    r"|I do(?:n't| not) have|you'll (?:need|have) |blocked[:.]|(?:^|you )please (?!l)")
_WORK_DONE = re.compile(
    r"(?im)(?:^|[.!;] )\W{0,6}(?:(?:I|We)(?:'ve| have)? )?(?:\w+ly |also |now )?(?!need"
    r"|block|wait|bas|relat|stop|paus|not|propos|tri|fail)(?:done|all set|ran|[a-z]"
    r"{1,16}(?:ed|rote|uilt|ade))\b|\b(?!I\b)\w+ now \w+s\b|\bpass(?:ed)?\b|✅"
    r"|\b(?:is|are|all|been|now) (?:done|fixed|ready|complete)")

def _from_prose(result: AgentResult) -> _Report:
    """Who must act next? An offer after finished work holds nothing up."""
    even = result.text.translate(_EVEN).replace("**", "")
    prose = _NOT_PROSE.sub(lambda p: "_ "["\n" in p[0]] * len(p[0]), even).rstrip()
    start, done = max(0, len(prose) - _TAIL_CHARS), bool(_WORK_DONE.search(prose))
    said = [(m[0].strip(), slice(*m.span())) for m in _SENTENCE.finditer(prose, start)]
    asked = [(words, at) for words, at in said if not _COURTESY.search(words)
             and (not done or _CHOOSES.search(words))]
    rules = {"text_question": (_QUESTION, asked), "text_request": (_REQUEST, said),
             "text_blocked": (_HALTED, said), "text_stuck": (_STUCK, said * (not done))}
    for rule, (pattern, among) in rules.items():
        if at := next((at for words, at in among if pattern.search(words)), None):
            return rule, {"status": "needs_human", "question": even[at].strip(),
                          "options": _CHOICE.findall(even, at.start, len(prose))}
    if not result.text.strip():
        return "empty", {"error": "the agent ended without a word"}
    return "text_done" if done else "text_no_request", {"status": "completed"}

def _from_end(result: AgentResult) -> _Report:
    """By how the call ended: no result event, or one that is an error."""
    why = "\n".join(result.errors) or result.text or result.stderr_tail
    rules = (
        (result.subtype[6:], result.subtype.startswith("error_max_")),   # turns, budget
        (MISSING_SESSION, "No conversation found" in why),
        (result.ended, result.ended not in (Ended.EXIT, Ended.GRACE, Ended.LOST)),
        ("outage", outage(result) is not None), ("execution_error", result.has_result),
        ("no_result", result.events + result.bad_lines > 0), ("no_output", True))
    rule = next(rule for rule, applies in rules if applies)
    if rule == result.ended:
        why = f"{rule} after {result.duration_s:.0f} s"
    why = why.strip() or f"{rule.replace('_', ' ')}, exit status {result.exit_code}"
    return rule, {"error": why}

def _report(result: AgentResult, key: str, statuses: Sequence[str]) -> _Report | None:
    """A result that is no error counts however the process ended."""
    if not result.has_result or result.is_error:
        return _from_end(result)
    reports: tuple[_Report, ...] = (("structured", result.structured or {}),
                                    ("marker", _block(result.text, key)))
    return next((r for r in reports if _word(r[1]) in statuses), None)

def _from_question(asked: Mapping[str, Any]) -> _Report:
    """Headless, the CLI refuses AskUserQuestion: nobody has seen it."""
    options = [_text(_object(o).get("label")) for o in _list(asked.get("options"))]
    return "asked", {"status": "needs_human", "options": options,
                     "question": asked.get("question")}

_STATUSES = {**{status.value: status for status in VerdictStatus},
             "passed": VerdictStatus.COMPLETED, "unclear": VerdictStatus.NEEDS_HUMAN}

def _verdict(result: AgentResult, report: _Report, unsaid: VerdictStatus) -> Verdict:
    rule, fields = report
    status = _STATUSES.get(_word(fields), unsaid)
    why = _field(fields, "diagnosis", "error", "summary", "question")
    why = why or shortened(result.text)
    if status is not VerdictStatus.NEEDS_HUMAN:
        return Verdict(status, rule, why)
    listed = fields.get("options") or ""
    options = listed if isinstance(listed, list) else _OPTION_END.split(str(listed))
    texts = (shortened(str(option).strip(" \t*•-")) for option in options[:10])
    return Verdict(status, rule, why, Question(
        _field(fields, "question") or why or "The agent did not say why.",
        tuple(filter(None, texts)), _field(fields, "recommendation")))

def judge(result: AgentResult) -> Verdict:
    """Decide what a call came to. Ask `outage` first: it is no verdict on the task."""
    report = _report(result, "status", [*VerdictStatus]) or (
        _from_question(result.asked) if result.asked else _from_prose(result))
    return _verdict(result, report, VerdictStatus.FAILED)

def judge_e2e(result: AgentResult) -> Verdict:
    """What the scenario showed. Without a clear word only a person can settle it."""
    words = ("passed", "failed", "unclear", "needs_human")
    report = _report(result, "e2e_status", words) or ("no_status", {})
    return _verdict(result, report, VerdictStatus.NEEDS_HUMAN)

# ==== 8. Loop detection, delays ====================================== [pure]
_VOLATILE = (
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{7,64}\b", re.IGNORECASE), "<hash>"),
    (re.compile(r"(?:[A-Za-z]:)?(?:[\w.~-]*/){1,32}[\w.~-]+"), "<path>"),
    (re.compile(r"\d+(?:[.:,-]\d+)*"), "<n>"))

def similarity(a: str, b: str) -> float:
    """How alike two errors are, 0..1, by 300 words of each less what varies."""
    def words(text: str) -> list[str]:
        for pattern, placeholder in _VOLATILE:
            text = pattern.sub(placeholder, text[:4000])
        return text.casefold().split()[:300]
    return difflib.SequenceMatcher(None, words(a), words(b), autojunk=False).ratio()

def detect_loop(record: TaskRecord, *, max_attempts: int, same_from: float) -> str:
    """Why the task must not be tried again, or ''. Crashes count, questions do not."""
    asked = sum(a.status == VerdictStatus.NEEDS_HUMAN for a in record.attempts)
    tries = record.started - asked
    if tries >= max_attempts:
        errors = [a.evidence for a in record.attempts
                  if a.status == VerdictStatus.FAILED]
        alike = min(map(similarity, errors, errors[1:]), default=0.0)
        told = f", errors {alike:.0%} alike" if alike >= same_from else ""
        return f"failed {tries} times, limit {max_attempts}{told}"
    if asked >= MAX_QUESTIONS:
        return f"asked {asked} questions, limit {MAX_QUESTIONS}"
    return ""

def retry_delay_s(outage: Outage, outages: int, *, now: float,
                  delays_s: Sequence[float], limit_wait_s: float) -> float | None:
    """Seconds to the n-th retry in a row, or None; moments are since the epoch."""
    if outages > len(delays_s):
        return None
    if outage.kind is not OutageKind.LIMIT or outage.resets_at is None:
        return delays_s[outages - 1]
    wait_s = max(0.0, outage.resets_at - now) + LIMIT_MARGIN_S
    return wait_s if wait_s <= limit_wait_s else None

# ==== 9. System ports =============================================== [shell]
class Clock:
    """Time. Durations come from `monotonic`, stamps from `now`; never mixed."""
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def now(self) -> datetime:
        return datetime.now(UTC)

def stamp(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")

@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A process to start. `holds_stdin`: its stdin is closed only to stop it."""
    argv: tuple[str, ...]
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    stdin: bytes = b""
    holds_stdin: bool = False

@dataclass(frozen=True, slots=True)
class ProcessResult:
    """How a command ended; `exit_code` is negative for a signal, None if killed."""
    ended: Ended
    exit_code: int | None
    duration_s: float
    stdout: bytes = b""
    stderr: bytes = b""
    interrupted: Interrupted | None = None

    @property
    def output(self) -> str:
        both = self.stdout[-(64 << 10):] + self.stderr[-(64 << 10):]
        return both.decode(errors="replace").strip()

    def checked(self, what: str, *, hint: str, told: str = "") -> ProcessResult:
        """This result. Raises SandboxError, with what it told, unless it succeeded."""
        if self.exit_code != 0:
            told = told or shortened(self.output) or (
                f"{self.ended}, status {self.exit_code}")
            raise SandboxError(f"{what}: {told}", hint=hint)
        return self

class Listener:
    """Who reads a running command; this one keeps the last `limit` bytes of each pipe.
    `on_tick` comes each second at least; true starts the result grace."""
    def __init__(self, limit: int) -> None:
        self.out, self.err, self._limit = bytearray(), bytearray(), limit
    def hear(self, data: bytes, *, is_error: bool) -> None:
        kept = self.err if is_error else self.out
        kept += data[-self._limit:]
        del kept[:-self._limit]
    def on_tick(self, idle_s: float) -> bool:
        return False

def _started(command: Command, stderr: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command.argv, bufsize=0, cwd=command.cwd, env=command.env, stderr=stderr,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        told = shortened(shlex.join(command.argv), 160)
        raise SandboxError(f"cannot start {command.argv[0]!r}: {error.strerror}",
                           hint=f"is it on PATH? {told}") from None

class _Child:
    """One started command, a thread at each pipe: no side ever waits for another."""
    def __init__(self, command: Command, listener: Listener, clock: Clock,
                 secrets: Sequence[bytes]) -> None:
        self._command, self._listener, self._clock = command, listener, clock
        p = _started(command, subprocess.PIPE)
        self._popen, self.poll = p, p.poll      # the exit code, None while it runs
        self.started_at = self._last_output_at = clock.monotonic()
        self._done_at, self.open_pipes = float("inf"), 2
        # few, and then the threads wait: what is not yet told stays in the pipe
        self._heard = queue.Queue[tuple[bytes, bool]](2)
        self._redactors = Redactor(secrets), Redactor(secrets)
        for act, *args in ((self._write,), (self._read, p.stdout, False),
                           (self._read, p.stderr, True)):
            threading.Thread(target=act, args=args, daemon=True).start()

    def _write(self) -> None:
        left, stdin = memoryview(self._command.stdin), self._popen.stdin
        with contextlib.suppress(OSError, ValueError):   # nobody reads it any more
            while left and stdin:
                left = left[os.write(stdin.fileno(), left):]
        if stdin and not self._command.holds_stdin:
            stdin.close()

    def _read(self, pipe: IO[bytes], is_error: bool) -> None:
        with contextlib.suppress(AttributeError, OSError):   # a mere speed-up
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with contextlib.suppress(OSError, ValueError):           # given up meanwhile
            while data := os.read(pipe.fileno(), PIPE_BYTES):
                self._heard.put((data, is_error))
            self._heard.put((b"", is_error))

    def _pump(self, wait_s: float) -> None:
        """Tell what was heard; look twice a second, since others may hold the pipes."""
        with contextlib.suppress(queue.Empty, subprocess.TimeoutExpired):
            if not self.open_pipes:
                self._popen.wait(min(wait_s, 0.5))
                return
            data, is_error = self._heard.get(timeout=min(wait_s, 0.5))
            if data:
                self._last_output_at = self._clock.monotonic()
            self.open_pipes -= not data
            if told := self._redactors[is_error].feed(data):
                self._listener.hear(told, is_error=is_error)

    def watch(self, *, timeout_s: float, idle_s: float) -> Ended:
        """Pump until the process ends or a deadline passes; say which."""
        while self.poll() is None:
            now = self._clock.monotonic()
            next_at, reason = min((self._done_at + RESULT_GRACE_S, Ended.GRACE),
                                  (self.started_at + timeout_s, Ended.TIMEOUT),
                                  (self._last_output_at + idle_s, Ended.IDLE))
            if now >= next_at:
                return reason
            if self._listener.on_tick(now - self._last_output_at):
                self._done_at = min(self._done_at, now)
            self._pump(next_at - now)
        return Ended.EXIT

    def pump_until(self, is_over: Callable[[], bool], *, timeout_s: float) -> None:
        until = self._clock.monotonic() + timeout_s
        while not is_over() and (left_s := until - self._clock.monotonic()) > 0:
            self._pump(left_s)

    def stop(self) -> None:
        """SIGINT, or the end of a held stdin: the CLI still tells what it cost."""
        if self._command.holds_stdin and self._popen.stdin:
            self._popen.stdin.close()
        else:
            self._popen.send_signal(signal.SIGINT)
        self.pump_until(lambda: self.poll() is not None, timeout_s=KILL_GRACE_S)

    def close(self) -> None:
        with self._popen, contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

class Processes:
    """The only door to other processes; takes secrets out of what they print."""
    def __init__(self, clock: Clock, secrets: Sequence[bytes] = ()) -> None:
        self._clock, self._secrets = clock, secrets

    def stream(self, command: Command, *, listener: Listener, timeout_s: float,
               idle_s: float = float("inf")) -> ProcessResult:
        """Run `command` to its end or a deadline (in all, of a silence); leave nothing
        of its group. A signal that stops it is handed back."""
        child = _Child(command, listener, self._clock, self._secrets)
        ended, interrupted = Ended.STOPPED, None
        with contextlib.closing(child):
            try:
                ended = child.watch(timeout_s=timeout_s, idle_s=idle_s)
            except Interrupted as signalled:
                interrupted = signalled
            if ended is not Ended.EXIT:
                child.stop()
            # what is left; for a moment only, since others may hold the pipes open
            child.pump_until(lambda: not child.open_pipes, timeout_s=DRAIN_GRACE_S)
            exit_code = child.poll()
        duration_s = self._clock.monotonic() - child.started_at
        return ProcessResult(ended, exit_code, duration_s, interrupted=interrupted)

    def run(self, command: Command, *, timeout_s: float = COMMAND_TIMEOUT_S,
            max_bytes: int = 1 << 20) -> ProcessResult:
        """Run `command`, keep the last `max_bytes` of each pipe. Raises Interrupted."""
        kept = Listener(max_bytes)
        done = self.stream(command, listener=kept, timeout_s=timeout_s)
        if done.interrupted:
            raise done.interrupted
        return dataclasses.replace(done, stdout=bytes(kept.out), stderr=bytes(kept.err))

class Held:
    """A command that ends when we do, or close it; `told` is its first line, or ''."""
    def __init__(self, command: Command) -> None:
        self._popen = _started(command, subprocess.DEVNULL)
        assert self._popen.stdout
        with self._popen.stdout as out:
            ready = select.select([out], [], [], STEP_TIMEOUT_S)[0]
            self.told = out.readline().decode().strip() if ready else ""

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.communicate(timeout=STEP_TIMEOUT_S)
        self._popen.kill()

class Notifier:
    """Tells somebody who is elsewhere. One that fails is a warning and no more."""
    def __init__(self, processes: Processes, config: Config,
                 warn: Callable[[str], None]) -> None:
        self._processes, self._config, self._warn = processes, config, warn

    def tell(self, event: str, milestone: str, text: str) -> None:
        """`event`: question, completed, failed, interrupted, waiting or resumed."""
        config, told = self._config, f"{milestone} {event}: {text}"
        news = json.dumps({"event": event, "milestone": milestone,
                           "text": told, "content": told})     # Slack's and Discord's
        desktop = ("notify-send", PROGRAM, told) if sys.platform != "darwin" else (
            "osascript", "-e", f"display notification {json.dumps(told)}")
        post = "\n".join((f"url = {json.dumps(config.notify_url)}", "fail", "silent",
                          "show-error", 'header = "Content-Type: application/json"',
                          f"data = {json.dumps(news)}"))
        for is_wanted, argv, stdin in (      # curl reads it all: a URL may be a secret
                (config.notify_url, ("curl", "-K", "-"), post),
                (config.notify_command, ("sh", "-c", config.notify_command), news),
                (config.notify, desktop, "")):
            try:
                if is_wanted:
                    self._processes.run(Command(argv=argv, stdin=stdin.encode()),
                                        timeout_s=NOTIFY_TIMEOUT_S).checked(
                                            "it failed", hint="")
            except SandboxError as error:
                self._warn(f"warning: nobody was told by {argv[0]}: {error}")

class Terminal:
    """The person at the keyboard, if there is one."""
    def __init__(self, stdin: TextIO, stdout: TextIO) -> None:
        self._in, self._out = stdin, stdout
    def is_interactive(self) -> bool:
        return bool(self._in) and self._in.isatty() and self._out.isatty()

    def ask(self, prompt: str) -> str | None:
        """One line; None: the person closed the input (Ctrl-D)."""
        self._out.write(prompt)
        self._out.flush()
        return self._in.readline() or None

def install_signal_handlers() -> None:
    """SIGINT, SIGTERM and SIGHUP (unless nohup has it ignored) raise Interrupted."""
    def handler(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

# ==== 10. Sandboxes ================================================= [shell]
# Git as we run it in a workspace that an agent has had in its hands: no hooks, no
# helpers in the background, no lock of a git that was killed. Scripts get $1 (the
# branch), $2, ... A variable, since a function would cost a fork a call.
_GIT = """
git='git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.autocrlf=false
 -c gc.auto=0 -c advice.addEmbeddedRepo=false
 -c user.name=ktrdr_orchestrator -c user.email=orchestrator@localhost'
for f in .git/*.lock ".git/refs/heads/${1-}.lock"; do [ ! -e "$f" ] || rm -f "$f"; done
"""
_TREE = _GIT + """
$git add -A || { rm -f .git/index; $git add -A --ignore-errors || :; }
tree=$($git write-tree)
"""
# $2 base, $3 ref, $4 message. What the agent committed stays, if it is on the base.
_CHECKPOINT = _TREE + """
read -r on <.git/HEAD; at=
[ "$on" != "ref: refs/heads/$1" ] || read -r at <".git/refs/heads/$1" || at=
commit=$2
[ "$at" = "$2" ] || ! $git merge-base --is-ancestor "$2" @ || commit=$($git rev-parse @)
[ "$commit" != "$2" ] && [ "$tree" = "$($git rev-parse "$commit^{tree}")" ] ||
commit=$($git commit-tree "$tree" -p "$commit" -m "$4")
printf 'update %s %s\\n' "refs/heads/$1" "$commit" "$3" "$commit" |
$git update-ref --stdin
[ "$at" ] || $git symbolic-ref HEAD "refs/heads/$1"
echo "$commit"
"""
_SWITCH = """
rm -rf .git/rebase-merge .git/rebase-apply
$git checkout -q -f --ignore-other-worktrees -B "$1" "$2" --
$git clean -ffdq
$git rev-parse HEAD
"""
# $2 base, $3 ref for the work that is taken back, $4 message
_ROLLBACK = _TREE + """
told='log -1 --no-show-signature --format=%H%x20%T'
set -- "$@" $($git $told || $git $told "$2")     # HEAD may have lost its commit
[ "$5 $tree" = "$2 $6" ] ||
$git update-ref "$3" "$($git commit-tree "$tree" -p "$5" -m "$4")"
""" + _SWITCH
# $2 base, as the host or the clone names it, $3 ref for a branch that is in the way
_NEW_BRANCH = _GIT + """
set -- "$1" "$($git rev-parse -q --verify "origin/$2^{commit}" || echo "$2")" "$3"
old=$($git rev-parse -q --verify "refs/heads/$1") && $git update-ref "$3" "$old"
""" + _SWITCH
# $1 in what to clone, if it is a repository, $2 where to; nothing there leads back
_CLONE = """
top=$(git -C "$1" rev-parse --show-toplevel) || top=
if [ "$top" ]; then git clone -q --no-hardlinks "$top" "$2"; else git init -q "$2"; fi
cd "$2"
[ -z "$top" ] || git config --remove-section remote.origin      # its branches stay
git config user.name ktrdr_orchestrator
git config user.email orchestrator@localhost
git rev-parse -q --verify HEAD || git commit -q --allow-empty -m Start
git update-ref refs/orchestrator/start HEAD
"""

class Sandbox:
    """Where an agent works; `open` and `sweep` end all that lives in it."""
    name: str
    permissions: tuple[str, ...]
    _held: Held | None = None        # a process that lives as long as we do

    def __init__(self, processes: Processes, clock: Clock) -> None:
        self._processes, self._clock = processes, clock
    def open(self) -> None: ...
    def sweep(self) -> None: ...
    def command(self, argv: Sequence[str]) -> Command:
        raise NotImplementedError
    def agent_command(self, argv: Sequence[str], prompt: bytes) -> Command:
        return dataclasses.replace(self.command(argv), stdin=prompt)
    def release(self) -> None:
        if self._held:
            self._held.close()
    def close(self) -> None:
        with contextlib.suppress(SandboxLostError):      # so nothing lives in it
            self.sweep()
        self.release()

    def sh(self, script: str, *args: str, timeout_s: float = COMMAND_TIMEOUT_S,
           is_gate: bool = False, max_bytes: int = 1 << 20) -> ProcessResult:
        """Run a script of ours, or a gate, in the workspace; `args` are $1, $2, ..."""
        argv = ("sh", "-c" if is_gate else "-euc", script, "orchestrator", *args)
        command = self.command(argv)
        return self._processes.run(command, timeout_s=timeout_s, max_bytes=max_bytes)

    def _git(self, what: str, script: str, *args: str) -> str:
        done = self.sh(script, *args).checked(f"{what} in {self.name} failed",
                                              hint="sandbox init, if it is docker's")
        return done.stdout.decode(errors="replace").strip()
    def start_branch(self, branch: str, base: str, *, kept_as: str) -> str:
        """A new `branch` from `base` (HEAD: what was cloned), an old one `kept_as`."""
        start = "refs/orchestrator/start" if base == "HEAD" else base
        return self._git(f"new branch {branch}", _NEW_BRANCH, branch, start, kept_as)
    def checkpoint(self, branch: str, base: str, *, ref: str, message: str) -> str:
        """Commit all that is uncommitted; return the commit the task ends with."""
        return self._git("the checkpoint", _CHECKPOINT, branch, base, ref, message)
    def rollback(self, branch: str, base: str, *, ref: str, message: str) -> None:
        """Go back to `base`; what is taken back stays reachable as `ref`."""
        self._git("the rollback", _ROLLBACK, branch, base, ref, message)
    def has_commit(self, commit: str) -> bool:
        return self.sh('git cat-file -e "$1^{commit}"', commit).exit_code == 0
    def recover(self, branch: str, commit: str) -> None:
        """A repository that has `branch` at `commit`, around the files as they are."""
        raise SandboxError(f"{self.name} lacks commit {commit[:10]} of {branch}",
                           hint="was the workspace removed? run --fresh starts over")

    def bundle(self, commit: str, without: str) -> bytes:
        """BUNDLED at the commit, less what `without` reaches ('' = whole)."""
        script = 'git update-ref "$3" "$1"; git bundle create -q - "$3" ${2:+"^$2"}'
        done = self.sh(script, commit, without, BUNDLED, timeout_s=SLOW_TIMEOUT_S,
                       max_bytes=sys.maxsize)
        return done.checked(f"no bundle of {commit}", hint="git log there").stdout

# Kills what was started with $1 in its environment: that proves whose it is.
_KILL_MARKED = """
while pids=$(grep -lszxF -e "$1" /proc/[0-9]*/environ | cut -d/ -f3); [ "$pids" ]; do
    kill -9 $pids
    sleep 0.02
done
"""
# Ends a run's processes when the run is killed: waits for the end of a pipe that only
# the run holds. Its parent ends at once: it is no child to be swept.
_GUARD = f"""
trap '' INT TERM HUP
exec 3<&0
{{ read -r _ <&3; {_KILL_MARKED} }} >&2 &
"""

class LocalSandbox(Sandbox):
    """A git clone under the state directory, on this machine, as this user (Linux)."""
    permissions = ("--permission-mode", "acceptEdits",
                   "--allowedTools", "Bash,Read,Write,Edit,Glob,Grep")

    def __init__(self, processes: Processes, clock: Clock, *, folder: Path, repo: Path,
                 environ: Mapping[str, str]) -> None:
        super().__init__(processes, clock)
        self.folder, self._repo = folder.absolute(), repo
        self.name = f"local sandbox {folder}"
        self._host_env = {k: v for k, v in environ.items() if not k.startswith(
            ("GIT_", "ORCHESTRATOR_"))} | {"GIT_TERMINAL_PROMPT": "0"}
        self._env = self._host_env | {
            MARK: str(self.folder), f"{MARK}_RUN": f"{os.getpid()}:{clock.monotonic()}",
            # should .git vanish: not the repository that the state directory is in
            "GIT_CEILING_DIRECTORIES": str(self.folder.parent)}

    def open(self) -> None:
        """Adopts orphans, so that nothing an agent starts slips away from `sweep`."""
        import ctypes  # 8 ms that only a run has to pay

        mark = f"{MARK}={self.folder}"
        self._host("timeout", "10", "sh", "-c", _KILL_MARKED, "sweep", mark).checked(
            f"what an earlier run left in {self.name} does not end",
            hint=f"grep -lsz {mark} /proc/*/environ")
        self._held = Held(Command(env=self._host_env, argv=(
            "sh", "-c", _GUARD, "guard", f"{MARK}_RUN={self._env[f'{MARK}_RUN']}")))
        if sys.platform != "linux" or ctypes.CDLL(None).prctl(
                PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise SandboxError("the local sandbox needs Linux", hint="--sandbox docker")
        if (self.folder / ".git").is_dir():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.new")
        self._host("sh", "-euc", _CLONE, "clone", str(self._repo), str(fresh)).checked(
            f"no clone of {self._repo}", hint=f"git -C {self._repo} fsck")
        fresh.rename(self.folder)

    def _host(self, *argv: str) -> ProcessResult:
        return self._processes.run(Command(argv=argv, env=self._host_env),
                                   timeout_s=SLOW_TIMEOUT_S)
    def command(self, argv: Sequence[str]) -> Command:
        return Command(argv=tuple(argv), cwd=self.folder, env=self._env)

    def sweep(self) -> None:
        """Freezes our descendants, so that none replaces another, and kills them."""
        me, until = os.getpid(), self._clock.monotonic() + 10.0
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            if self._clock.monotonic() > until:
                raise SandboxError("what the agent started does not end",
                                   hint="look at it with ps, then start again")
            parents, ours = dict[int, int](), set[int]()
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):       # it ended meanwhile
                    fields = stat.read_bytes().rpartition(b")")[2].split()
                    parents[int(stat.parent.name)] = int(fields[1])
            while more := {p for p, of in parents.items() if of in {me, *ours}} - ours:
                ours |= more
            for act, pid in itertools.product((signal.SIGSTOP, signal.SIGKILL), ours):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, act)
            self._clock.sleep(0.002)

_AGENT_VARIABLES = re.compile(r"(ANTHROPIC|CLAUDE_CODE)_\w+")
_OF_A_GATEWAY = ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL")   # its overlay sets them
_UP = ("up", "-d", "--no-build")
_JANITOR = ("run", "--rm", "--no-deps")
_RECREATE = (*_UP, "--force-recreate", "-t", "0", "sandbox")
INSIDE = "/usr/local/lib/sandbox"        # our scripts in the image
# For bash. One system call ends all processes of the agent's user but PID 1 and its
# caller, and needs no new one, so a full process table does not stop it. Then a look.
_END_ALL = """
left() {
    for file in /proc/[0-9]*/status; do
        case $file in /proc/1/*|/proc/$$/*) continue; esac
        read -rd '' status <"$file"
        [[ ! $status =~ Uid:[[:space:]]$UID[[:space:]] ]] || return 0
    done 2>/dev/null
    return 1
}
until kill -9 -1 2>/dev/null; ! left; do
    [ $((++rounds)) -le 10 ] || exit 9
    sleep 0.05
done
read -r stat </proc/1/stat
set -- ${stat##*) }
echo "held since ${20}"        # as hold.sh says: another start is another container
"""

class DockerSandbox(Sandbox):
    """Service `sandbox` of a compose project. Its lock is a process in it, not ours."""
    permissions = ("--dangerously-skip-permissions",)

    def __init__(self, processes: Processes, clock: Clock, *, compose_files: str,
                 environ: Mapping[str, str], key_by: str = "descriptor") -> None:
        super().__init__(processes, clock)
        self.name, self._env = f"docker sandbox {compose_files}", environ
        files = (f"--file={file}" for file in compose_files.split(os.pathsep))
        self._compose = ("docker", "compose", *files)
        keys = {name: environ[name].encode() for name in KEYS if environ.get(name)}
        self._agent_keys = keys if key_by == "descriptor" else {}
        self._gateway_keys = keys if key_by == "gateway" else {}
        other = {"descriptor": KEYS, "gateway": (*KEYS, *_OF_A_GATEWAY)}.get(key_by, ())
        # the names only: compose takes the values, so that no argv shows a secret
        handed = filter(_AGENT_VARIABLES.fullmatch, sorted(environ.keys() - other))
        self.variables = tuple(f"--env={name}" for name in handed)

    def composed(self, *args: str, **about: Any) -> Command:
        return Command(argv=(*self._compose, *args), env=self._env, **about)
    def compose(self, *args: str, stdin: bytes = b"",
                timeout_s: float = COMMAND_TIMEOUT_S) -> ProcessResult:
        """Run `docker compose ARGS`. Raises SandboxError if it fails."""
        command = self.composed(*args, stdin=stdin)
        return self._processes.run(command, timeout_s=timeout_s).checked(
            f"docker compose {shlex.join(args)}",
            hint=f"docker info; {PROGRAM} sandbox init")

    def janitor(self, *args: str, stdin: bytes = b"") -> Mapping[str, Any]:
        """What workspace.py did in a container of its own. Raises SandboxError."""
        command = self.composed(*_JANITOR, "-T", "janitor", "workspace.py", *args,
                                 stdin=stdin)
        done = self._processes.run(command, timeout_s=SLOW_TIMEOUT_S)
        report = next(json_objects(done.stdout.splitlines()[-1:]), {})
        done.checked(f"{args[0]} in {self.name}", told=_text(report.get("error")),
                     hint=_text(report.get("hint")) or f"{PROGRAM} sandbox init")
        return report

    def hold(self) -> bool:
        """Take the sandbox's lock; False: it does not run. Raises LockHeldError."""
        self.release()
        self._held = Held(self.composed(
            "exec", "-T", "-u", "nobody", "sandbox", f"{INSIDE}/hold.sh",
            f"PID {os.getpid()} on {os.uname().nodename}"))
        if self._held.told.startswith("in use"):
            raise LockHeldError(f"{self.name} is {self._held.told}",
                                hint=f"wait for it; {PROGRAM} status")
        return self._held.told.startswith("held")

    def bring_up(self, delays_s: Sequence[float] = (0,)) -> None:
        """Hold it, after a start or a new container if it was dead, paused or gone."""
        for delay_s, step in itertools.product(delays_s, ((), _UP, _RECREATE)):
            self._clock.sleep(0 if step else delay_s)
            problem = SandboxError(f"{self.name} does not stay up", hint="docker ps -a")
            try:
                if step:
                    self.compose(*step)
                if self.hold():
                    for key in self._gateway_keys.values():
                        self.compose("exec", "-T", "gateway", "set-key", stdin=key)
                    return
            except SandboxError as error:
                problem = error
        raise problem

    def open(self) -> None:
        self.bring_up()
        self.sweep()
    def command(self, argv: Sequence[str]) -> Command:
        return self.composed("exec", "-T", "sandbox", *argv)

    def agent_command(self, argv: Sequence[str], prompt: bytes) -> Command:
        """Under supervise.py, which tells what it reads and when it stops the agent."""
        parts = {"prompt": prompt, **self._agent_keys}
        head = " ".join(f"{name}={len(part)}" for name, part in parts.items())
        return self.composed(
            "exec", "-T", *self.variables, "sandbox", "python3",
            f"{INSIDE}/supervise.py", "--", *argv, holds_stdin=True,
            stdin=b"".join((head.encode(), b"\n", *parts.values())))

    def sweep(self) -> None:
        """Raises SandboxLostError, when it runs again, if it died in the meantime."""
        done = self._processes.run(self.command((
            f"{INSIDE}/untraceable-bash", "-c", _END_ALL)), timeout_s=STEP_TIMEOUT_S)
        if self._held and done.stdout.decode().strip() == self._held.told:
            return
        is_lost = done.exit_code in (0, 1)   # another one, or docker finds none
        if not is_lost:              # no process to be had for the script, or too slow
            self.compose(*_RECREATE)
        self.bring_up(REVIVAL_DELAYS_S)
        if is_lost:
            raise SandboxLostError(f"{self.name} went away and was brought back",
                                   hint="docker compose logs; docker events")

    def _git(self, what: str, script: str, *args: str) -> str:
        """Once more, around a repository made anew, should the agent's not do."""
        try:
            return super()._git(what, script, *args)
        except SandboxError:
            if not re.fullmatch("[0-9a-f]{40,64}", args[1]):     # nothing to go by
                raise
            self.sweep()
            self.recover(*args[:2])
            return super()._git(what, script, *args)

    def recover(self, branch: str, commit: str) -> None:
        self.janitor("repair", branch, commit)

    def checkpoint(self, branch: str, base: str, *, ref: str, message: str) -> str:
        """And a copy where the agent cannot reach it."""
        commit = super().checkpoint(branch, base, ref=ref, message=message)
        self.janitor("save")
        return commit

    def reset(self) -> Mapping[str, Any]:
        """A new container; the volumes are cleared by workspace.py, which proves it."""
        self.compose(*_RECREATE)
        self.bring_up()
        report = self.janitor("reset")
        if report.get("trash"):
            self.compose(*_JANITOR, "-d", "janitor", "workspace.py", "sweep")
        return report

# ==== 11. Agent ===================================================== [shell]
@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the disk refuses within becomes a StateError."""
    try:
        yield
    except OSError as error:
        raise StateError(f"{path}: {error.strerror or error}", hint="the file is as it "
                         "was; make room or fix the rights") from None

class Transcript(Listener):
    """What one call printed: NAME.ndjson, ended by a line of ours, and NAME.stderr."""
    def __init__(self, path: Path, on_tool: Callable[[str], None],
                 on_silence: Callable[[float], None]) -> None:
        super().__init__(STDERR_TAIL_BYTES)
        self._path, self._on_tool, self._on_silence = path, on_tool, on_silence
        self._decoder = StreamDecoder()
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            path.with_suffix(".stderr").unlink(missing_ok=True)   # of an uncounted call

    def hear(self, data: bytes, *, is_error: bool) -> None:
        path = self._path.with_suffix(".stderr") if is_error else self._path
        with disk(path), path.open("ab") as file:
            file.write(data)
        super().hear(data, is_error=is_error)
        for tool in () if is_error else self._decoder.feed(data):
            self._on_tool(tool)

    def on_tick(self, idle_s: float) -> bool:
        self._on_silence(idle_s)
        return self._decoder.seen.has_result

    def finish(self, done: ProcessResult) -> AgentResult:
        """Write the last line, which tells how the call ended, and fold all of it."""
        end = json.dumps({"type": END_EVENT, "ended": done.ended, "exit_code":
                          done.exit_code, "duration_s": round(done.duration_s, 3)})
        start = "\n" if self.out and not self.out.endswith(b"\n") else ""
        self.hear(f"{start}{end}\n".encode(), is_error=False)
        return self._decoder.finish(self.err.decode("utf-8", "replace").strip())

def read_transcript(path: Path, chunks: Iterable[bytes]) -> AgentResult:
    """Fold a recorded stream as a run does; stderr is taken from NAME.stderr."""
    decoder, stderr = StreamDecoder(), b""
    for chunk in chunks:
        decoder.feed(chunk)
    with contextlib.suppress(OSError):
        stderr = path.with_suffix(".stderr").read_bytes()[-STDERR_TAIL_BYTES:]
    return decoder.finish(stderr.decode("utf-8", "replace").strip())

class ClaudeAgent:
    """`claude -p` in the sandbox; what interrupts it comes back beside its result."""
    def __init__(self, sandbox: Sandbox, processes: Processes, config: Config, *,
                 on_tool: Callable[[str], None],
                 on_silence: Callable[[float], None]) -> None:
        self._sandbox, self._processes, self._config = sandbox, processes, config
        self._on_tool, self._on_silence = on_tool, on_silence

    def ask(self, prompt: str, *, schema: Mapping[str, Any], transcript: Path,
            session_id: str = "", model: str = "", timeout_s: float | None = None,
            budget_usd: float = 0.0,
            ) -> tuple[AgentResult, Interrupted | SandboxLostError | None]:
        """In a fresh session or `session_id`; nothing of it is alive afterwards."""
        config, sandbox = self._config, self._sandbox
        argv = [*shlex.split(config.claude), "-p", "--output-format", "stream-json",
                "--verbose", "--json-schema", json.dumps(schema),
                "--max-turns", str(config.max_turns), *sandbox.permissions]
        options = {"--model": model or config.model, "--resume": session_id,
                   "--max-budget-usd": f"{budget_usd:.4f}" if budget_usd else ""}
        argv += [part for pair in options.items() if pair[1] for part in pair]
        heard = Transcript(transcript, self._on_tool, self._on_silence)
        done = self._processes.stream(
            sandbox.agent_command(argv, prompt.encode()), listener=heard,
            timeout_s=timeout_s or config.task_timeout_s, idle_s=config.idle_timeout_s)
        stopped: Interrupted | SandboxLostError | None = done.interrupted
        try:
            sandbox.sweep()
        except SandboxLostError as lost:
            stopped = stopped or lost
        return heard.finish(done), stopped

# ==== 12. State, lock, ledger ======================================= [shell]
def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content, on the disk; or raise StateError, nothing changed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

def _record_from(raw: Mapping[str, Any]) -> TaskRecord:
    asked = raw["question"]
    return TaskRecord(**{
        **raw, "status": TaskStatus(raw["status"]),
        "attempts": tuple(Attempt(**attempt) for attempt in raw["attempts"]),
        "question": asked and Question(**asked | {"options": tuple(asked["options"])})})

class StateStore:
    """RunState in `<milestone>_state.json`; `completed_tasks` and such are for jq."""
    def __init__(self, state_dir: Path, milestone: str, clock: Clock) -> None:
        self.path = state_dir / f"{milestone}_state.json"
        self.folder = state_dir / milestone
        self._clock = clock
        self._lines: dict[str, tuple[TaskRecord, str]] = {}

    def transcript(self, task_id: str, number: int, part: int = 0) -> Path:
        """Where the n-th attempt is recorded; `part` counts the calls within it."""
        name = re.sub(r"[^\w.-]", "_", task_id)
        return self.folder / f"{name}-{number}{f'.{part}' if part else ''}.ndjson"
    def new_transcript(self, task_id: str, number: int) -> Path:
        parts = (self.transcript(task_id, number, n) for n in itertools.count())
        return next(path for path in parts if not path.exists())

    def save(self, state: RunState) -> RunState:
        """On the disk when this returns; hands the saved state on."""
        state = dataclasses.replace(state, updated_at=stamp(self._clock.now()),
                                    cost_usd=round(state.cost_usd, 6))
        write_atomically(self.path, self._encoded(state).encode())
        return state

    def _encoded(self, state: RunState) -> str:
        """Unchanged records keep their lines: 500 tasks are saved as fast as three."""
        for i, record in state.tasks.items():
            if i not in self._lines or self._lines[i][0] is not record:
                line = json.dumps({i: record}, default=dataclasses.asdict)[1:-1]
                self._lines[i] = record, line
        tasks = {i: record.status for i, record in state.tasks.items()}
        head = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)} | {
            "version": STATE_VERSION, "e2e_status": tasks.pop(E2E_ID, None),
            "completed_tasks": [i for i in tasks if tasks[i] is TaskStatus.COMPLETED],
            "failed_tasks": [i for i in tasks if tasks[i] is TaskStatus.FAILED],
            "task_attempt_counts": {i: r.started for i, r in state.tasks.items()}}
        del head["tasks"]                # but for these, encoded below
        text = json.dumps(head, default=dataclasses.asdict, separators=(",\n", ": "))
        results = ",\n  ".join(self._lines[i][1] for i in state.tasks)
        return f'{text[:-1]},\n"task_results": {{\n  {results}\n}}}}\n'

    def load(self) -> RunState | None:
        """The saved state, if any. Raises StateError for a damaged file or version."""
        try:
            with disk(self.path):
                if not os.path.lexists(self.path):
                    return None
                raw = json.loads(self.path.read_bytes())
            if raw["version"] != STATE_VERSION:
                raise ValueError(f"version {raw['version']!r}, not {STATE_VERSION}")
            raw["tasks"] = {i: _record_from(r) for i, r in raw["task_results"].items()}
            raw["wait"] = raw["wait"] and Wait(**raw["wait"])
            names = (field.name for field in dataclasses.fields(RunState))
            return RunState(**{name: raw[name] for name in names})
        except (ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            raise StateError(f"{self.path}: damaged or newer: {error!r}", hint="move "
                             "it away or use run --fresh, which archives it") from None

    def archive(self) -> Path | None:
        """Move transcripts, workspace and state aside; None: there was nothing."""
        target = self.path.parent / "archive" / (
            f"{self.folder.name}-{self._clock.now():%Y%m%dT%H%M%S.%f}")
        found = [path for path in (self.folder, self.path) if path.exists()]
        with disk(target):
            for path in found:           # the state last: it tells what is missing
                target.mkdir(parents=True, exist_ok=True)
                path.rename(target / path.name)
        return target if found else None

class RunLock:
    """`<name>.lock`: under flock while its owner lives; names PID, start and host."""
    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock

    def __enter__(self) -> RunLock:
        """Raises LockHeldError."""
        with disk(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = "PID {pid} on {host}".format(**self.owner() or {
                    "pid": "?", "host": "a machine that just began"})
                raise LockHeldError(f"milestone {self._path.stem} is in use by {who}",
                                    hint=f"{PROGRAM} status shows how far it is"
                                    ) from None
            self._file.truncate(0)
            self._file.write(json.dumps({
                "pid": os.getpid(), "host": os.uname().nodename,
                "start": stamp(self._clock.now())}))
            self._file.flush()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._file.truncate(0)
        self._file.close()

    def owner(self) -> Mapping[str, Any] | None:
        """Who owns it, or did when it was killed and nobody has the PID since."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            owner: Mapping[str, Any] = json.loads(self._path.read_bytes())
            if owner["host"] == os.uname().nodename:
                os.kill(int(owner["pid"]), 0)
            return owner
        return None

class Ledger:
    """`ledger.jsonl`: an object a line for each agent call, only ever appended to."""
    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: Mapping[str, Any]) -> None:
        """On the disk when this returns. Raises StateError."""
        line = json.dumps(entry).encode() + b"\n"
        with disk(self._path), self._path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            is_torn = file.read(1) not in (b"", b"\n")      # by a writer that died
            file.write(b"\n" * is_torn + line)
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> Iterator[Mapping[str, Any]]:
        with disk(self._path), contextlib.suppress(FileNotFoundError), \
                self._path.open("rb") as file:
            yield from json_objects(file)

# ==== 13. Telemetry ================================================= [shell]
class Telemetry:
    """Spans by OTLP/HTTP: milestone > task > claude_invoke. Off without an endpoint."""
    def __init__(self, environ: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self._warn, self._complaint = warn, ""
        self._provider: Any = None
        names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        if any(map(environ.get, names)) and \
                environ.get("OTEL_TRACES_EXPORTER") != "none":
            self._guard(self._start)

    def _guard(self, act: Callable[[], object]) -> None:
        """Do it; that it fails must not matter, be it that the package is missing."""
        try:
            act()
        except (ImportError, OSError, ValueError, TypeError, AttributeError,
                LookupError, RuntimeError) as error:
            self._complaint = f"{type(error).__name__}: {error}"

    def _start(self) -> None:
        import logging

        from opentelemetry.exporter.otlp.proto.http import trace_exporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider, export

        def hear(record: Any) -> bool:     # in place of tracebacks
            self._complaint = self._complaint or record.getMessage()
            return False
        (listener := logging.Handler()).addFilter(hear)
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [listener], False
        ours = Resource({"service.name": PROGRAM, "service.version": __version__})
        resource = ours.merge(OTELResourceDetector().detect())    # the user's wins
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(export.BatchSpanProcessor(
            trace_exporter.OTLPSpanExporter(timeout=TELEMETRY_CLOSE_S)))
        self._provider = provider

    @contextlib.contextmanager
    def span(self, name: str, **about: str) -> Iterator[Callable[..., None]]:
        """A span `orchestrator.NAME`; yields what takes attributes known at its end."""
        if self._provider is None:
            yield lambda _: None
            return
        about = {f"orchestrator.{key}": value for key, value in about.items()}
        with self._provider.get_tracer(PROGRAM, __version__).start_as_current_span(
                f"orchestrator.{name}", attributes=about) as span:
            yield span.set_attributes

    def close(self) -> None:
        """Send what is left, for TELEMETRY_CLOSE_S at most."""
        if self._provider is not None:
            sender = threading.Thread(
                target=self._guard, args=(self._provider.force_flush,), daemon=True)
            sender.start()
            sender.join(TELEMETRY_CLOSE_S)
            self._complaint = self._complaint or "no answer" * sender.is_alive()
        if self._complaint:
            self._warn(f"warning: telemetry was not sent: {self._complaint}")

# ==== 14. Reporting ================================================= [shell]
# An agent's escape sequences, and characters that turn the direction of reading.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

def duration_text(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    text = str(timedelta(seconds=int(seconds)))
    return text.removeprefix("0:").removeprefix("0")

def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = (header, *rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)

class Reporter:
    """The only writer of text: answers to stdout, the rest to stderr."""
    def __init__(self, out: TextIO, err: TextIO, clock: Clock, *,
                 environ: Mapping[str, str]) -> None:
        self._out, self._err, self._clock = out, err, clock
        self._is_live = err.isatty() and environ.get("TERM", "") not in ("", "dumb")
        self._form = "%H:%M:%S" if self._is_live else "%Y-%m-%dT%H:%M:%SZ"
        self._erase = ""                 # takes the live line away
        self._task, self._tools, self._since, self._heard_at = "", 0, 0.0, 0.0

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        encoding = stream.encoding or "utf-8"    # ASCII under some locales
        try:
            stream.write(text.encode(encoding, "replace").decode(encoding))
            stream.flush()
        except OSError:              # what is left must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise

    def _tell(self, text: str, is_live: bool = False) -> None:
        """On stderr, in place of the live line. If nobody reads, the work goes on."""
        text = _CONTROLS.sub("", text)
        with contextlib.suppress(OSError):
            self._write(self._err, f"{self._erase}{text}" + "\n" * (not is_live))
        self._erase = "\r\x1b[2K" if is_live else ""

    def answer(self, text: str) -> None:
        try:
            self._write(self._out, f"{_CONTROLS.sub('', text)}\n")
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise OrchestratorError(f"stdout: {error.strerror}") from None
    def progress(self, message: str, is_live: bool = False) -> None:
        self._tell(f"{self._clock.now():{self._form}} {message}", is_live)
    def error(self, error: OrchestratorError) -> None:
        hint = f"\n  try: {error.hint}" if error.hint else ""
        self._tell(f"{PROGRAM}: error: {error}{hint}")
    def begin(self, task_id: str, message: str) -> None:
        self.progress(message)
        self._task, self._tools = task_id, 0
        self._since = self._heard_at = self._clock.monotonic()
    def tool(self, told: str) -> None:
        self._tools += 1
        self._heard_at = self._clock.monotonic()
        self.progress(f"  {self._task}  {told}")

    def silence(self, idle_s: float) -> None:
        """Called at least each second while an agent works."""
        now = self._clock.monotonic()
        if now - self._heard_at >= (1.0 if self._is_live else HEARTBEAT_S):
            self._heard_at = now
            self.progress(
                f"  {self._task}  working for {duration_text(now - self._since)}, "
                f"{self._tools} tool calls, silent for {duration_text(idle_s)}",
                self._is_live)

def status_json(state: RunState, plan: Plan | None, is_running: bool) -> dict[str, Any]:
    """A milestone as `status --json` shows it; tasks not begun only with the plan."""
    titles = {step.id: step.title for step in plan.steps} if plan else {}
    records = {i: state.record(i) for i in (*titles, *state.tasks)}
    found = {record.status for record in records.values()}
    words = {"running": is_running, "needs_human": TaskStatus.NEEDS_HUMAN in found,
             "failed": TaskStatus.FAILED in found, "waiting": state.wait,
             "completed": found == {TaskStatus.COMPLETED}, "interrupted": True}
    return {
        "milestone": state.milestone, "plan": state.plan_path, "branch": state.branch,
        "status": next(word for word, applies in words.items() if applies),
        "started_at": state.started_at, "updated_at": state.updated_at,
        "cost_usd": round(state.cost_usd, 6),
        "wait": state.wait and dataclasses.asdict(state.wait),
        "tasks": [{
            "id": i, "title": r.title or titles.get(i, ""), "status": r.status,
            "attempts": r.started, "reason": r.reason, "checkpoint": r.checkpoint,
            "duration_s": round(sum(a.duration_s for a in r.attempts), 3),
            "cost_usd": round(sum(a.cost_usd for a in r.attempts), 6),
            "question": dataclasses.asdict(r.question) if r.question and
            r.status is TaskStatus.NEEDS_HUMAN else None} for i, r in records.items()]}

def status_text(shown: Mapping[str, Any]) -> str:
    """`status_json` for a person."""
    rows = [(t["id"], t["status"], str(t["attempts"]), duration_text(t["duration_s"]),
             f"${t['cost_usd']:.2f}", t["title"]) for t in shown["tasks"]]
    lines = ["{milestone}: {status}, ${cost_usd:.2f}, branch {branch}".format(**shown),
             table_text(("task", "status", "attempts", "time", "cost", "title"), rows)]
    for task in shown["tasks"]:
        if task["question"]:
            lines.append(question_text(task["id"], task["question"]))
        elif task["reason"]:
            lines.append(f"Task {task['id']}: {task['reason']}")
    if wait := shown["wait"]:
        until = wait["until"] or "it is started again"
        lines.append(f"Waits until {until}: {wait['reason']}")
    return "\n".join(lines)

def question_text(task_id: str, question: Mapping[str, Any]) -> str:
    lines = [f"Task {task_id} asks: {question['text']}"]
    lines += [f"  {chr(97 + i)}) {text}" for i, text in enumerate(question["options"])]
    if question["recommendation"]:
        lines.append(f"  recommended: {question['recommendation']}")
    return "\n".join(lines)

def readable_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The lines of `logs`: what the agent said, did and got to see."""
    for event in json_objects(lines):
        for block in map(_object, _list(_object(event.get("message")).get("content"))):
            if block.get("type") == "text":
                yield textwrap.indent(_text(block.get("text")), "  ")
            elif block.get("type") == "tool_use":
                yield f"> {tool_use(block)}"
            elif block.get("type") == "tool_result":
                shown = block.get("content")
                parts = [_text(_object(part).get("text")) for part in _list(shown)]
                text = shortened(_text(shown) or "\n".join(parts), 2000)
                sign = "! " if block.get("is_error") is True else "< "
                yield textwrap.indent(text or "(nothing)", sign)

# ==== 15. Escalation desk ============================================ [flow]
class EscalationDesk:
    """Gets an answer from a person now, or says that the question is parked."""
    def __init__(self, terminal: Terminal, reporter: Reporter, config: Config) -> None:
        self._terminal, self._reporter, self._config = terminal, reporter, config

    def ask(self, task_id: str, question: Question) -> str | None:
        """The answer in words; None: nobody is there, or they want to answer later."""
        self._reporter.progress(question_text(task_id, dataclasses.asdict(question)))
        while self._terminal.is_interactive():
            line = self._terminal.ask("Answer, letter, skip (as recommended), later: ")
            if line is None or line.strip().lower() == "later":
                break
            if answer := chosen_answer(line, question):
                return answer
        if not self._terminal.is_interactive() and (
                answer := recommended(self._config, question)):
            self._reporter.progress(f"nobody is here, so as recommended: {answer}")
            return answer
        return None

def recommended(config: Config, question: Question | None) -> str:
    """What --on-question recommend answers; not to what only a person can put right."""
    answer = question.recommendation if question else ""
    return answer if config.on_question == "recommend" and answer != CURED else ""

def chosen_answer(line: str, question: Question) -> str:
    """An option by letter or number, the recommendation for 'skip' or '', or words."""
    word = line.strip().lower()
    if word in ("", "skip"):
        return question.recommendation
    for number, option in enumerate(question.options):
        if word.rstrip(").") in (str(number + 1), chr(ord("a") + number)):
            return option
    return line.strip()

# ==== 16. Task runner ================================================ [flow]
@dataclass(frozen=True, slots=True)
class Crew:
    """The adapters a flow works with."""
    agent: ClaudeAgent
    sandbox: Sandbox
    store: StateStore
    ledger: Ledger
    desk: EscalationDesk
    notifier: Notifier
    reporter: Reporter
    telemetry: Telemetry
    clock: Clock
    config: Config

def left_to_wait_s(wait: Wait, now: datetime) -> float:
    until = datetime.fromisoformat(wait.until) if wait.until else now
    return (until - now).total_seconds()

def git_name(text: str) -> str:
    """A text as one component of a ref."""
    return re.sub(r"[^A-Za-z0-9_-]+", ".", text).strip(".").replace(".lock", "") or "x"

def ref(milestone: str, kind: str, name: str) -> str:
    """Where a checkpoint or rejected work of a milestone stays reachable."""
    return f"refs/orchestrator/{git_name(milestone)}/{kind}/{git_name(name)}"

def questions(state: RunState) -> dict[str, Question]:
    """Those that wait for an answer, by task."""
    return {i: record.question for i, record in state.tasks.items() if record.question
            and record.status is TaskStatus.NEEDS_HUMAN and not record.answer}

class TaskRunner:
    """Attempts one task until it is completed, stuck, or waits for a person. Each step
    ends with a save and the next is chosen by what was saved, after a crash too."""
    def __init__(self, crew: Crew, plan: Plan) -> None:
        self._crew, self._plan, self._config = crew, plan, crew.config
        self._save, self._tell = crew.store.save, crew.reporter.progress
        self._outages = self._losses = 0     # in a row, in this process
        self._is_clean = False       # the workspace is known to stand at the checkpoint

    def run(self, state: RunState, task: Task, *, guidance: str = "") -> RunState:
        """The state with the task completed, failed, or needing a person; saved."""
        name = "e2e_test" if task.id == E2E_ID else "task"
        with self._crew.telemetry.span(name, task=task.id, title=task.title) as note:
            while True:
                if asked := questions(state).get(task.id):
                    if (answer := self._crew.desk.ask(task.id, asked)) is None:
                        break
                    state = self._save(state.updated(task.id, answer=answer))
                else:
                    state = self._step(state, task, guidance)
                if state.record(task.id).status in OVER:
                    break
            record = state.record(task.id)
            note({"orchestrator.status": record.status.value,
                  "orchestrator.attempts": record.started})
        return state

    def _step(self, state: RunState, task: Task, guidance: str) -> RunState:
        """Whatever is next; once more from what was saved if the sandbox went away."""
        try:
            if settled := self._settle(state, task):
                return settled
            if reason := stop_reason(self._config, state, state.record(task.id)):
                return self._fail(state, task, reason)
            return self._attempt(self._sit_out(state), task, guidance)
        except SandboxLostError as lost:
            self._losses += 1
            if self._losses > MAX_LOSSES:
                raise
            self._tell(f"{lost}; once more")
            return self._crew.store.load() or state

    def _settle(self, state: RunState, task: Task) -> RunState | None:
        """Run the gates on what the agent calls completed, now or before a crash."""
        if in_flight(state.record(task.id)) != VerdictStatus.COMPLETED:
            return None
        if evidence := self._gates(task):
            *others, last = state.record(task.id).attempts
            last = dataclasses.replace(last, status=VerdictStatus.FAILED, rule="gate",
                                       evidence=evidence)
            # the ledger has the agent's word; the gate's, which outranks it, is free
            self._book(state, task, last, AgentResult(), kind="gate", cost_usd=0.0)
            return self._save(state.updated(task.id, attempts=(*others, last)))
        commit = self._crew.sandbox.checkpoint(
            state.branch, state.head, ref=ref(state.milestone, "checkpoints", task.id),
            message=f"Task {task.id}: {task.title}")
        self._is_clean = True
        self._tell(f"Task {task.id} completed, commit {commit[:10]}")
        return self._save(dataclasses.replace(state, head=commit).updated(
            task.id, status=TaskStatus.COMPLETED, checkpoint=commit, reason=""))

    def _attempt(self, state: RunState, task: Task, guidance: str) -> RunState:
        """From the checkpoint, or in the session whose question was answered."""
        old, session_id = state.record(task.id), ""
        if old.answer and in_flight(old) == VerdictStatus.NEEDS_HUMAN:
            session_id = old.attempts[-1].session_id
        if session_id:
            prompt = answer_prompt(self._plan, task.id, task.title,
                                   f"{old.answer}\n\n{guidance}".strip())
        else:
            state = self._roll_back(state, task)
            prompt = task_prompt(
                self._plan, task, dataclasses.replace(old, started=old.started + 1),
                max_attempts=self._config.max_attempts, guidance=guidance)
        state, verdict = self._ask(
            state, task, prompt, VERDICT_SCHEMA, judge, session_id)
        if verdict is None:
            return state
        statuses = [attempt.status for attempt in state.record(task.id).attempts]
        answered = old.question.text if old.question and session_id else ""
        if answered and verdict.question and similarity(
                verdict.question.text, answered) >= self._config.error_similarity:
            return self._fail(state, task, f"asks again what was answered: {answered}")
        if session_id and verdict.rule == MISSING_SESSION:   # a new one gets the answer
            state = state.updated(task.id, base="", started=old.started,
                                  attempts=old.attempts)
        elif verdict.question and statuses.count(verdict.status) < MAX_QUESTIONS:
            state = state.updated(task.id, status=TaskStatus.NEEDS_HUMAN, answer="",
                                  question=verdict.question)
        return self._save(state)

    def _fail(self, state: RunState, task: Task, reason: str) -> RunState:
        reason = shortened(reason)
        self._tell(f"Task {task.id} failed: {reason}")
        return self._roll_back(self._save(state.updated(
            task.id, title=task.title, status=TaskStatus.FAILED, reason=reason)), task)

    def _roll_back(self, state: RunState, task: Task) -> RunState:
        """The workspace at the last checkpoint; what stood there is kept in a ref."""
        if not self._is_clean:
            sandbox, number = self._crew.sandbox, state.record(task.id).started
            state = self._save(without_work(state))
            kept = ref(state.milestone, "rejected", f"{task.id}-{number}")
            while sandbox.has_commit(kept):      # numbers come again, refs must not
                kept += "_"
            sandbox.rollback(state.branch, state.head, ref=kept,
                             message=f"Rejected: task {task.id}, attempt {number}")
            self._is_clean = True
        return state

    def _counted(self, state: RunState, task: Task) -> RunState:
        number, limit = state.record(task.id).started + 1, self._config.max_attempts
        self._is_clean = False
        self._crew.reporter.begin(
            task.id, f"Task {task.id}: {task.title} (attempt {number} of {limit})")
        return self._save(state.updated(
            task.id, title=task.title, sha256=task.sha256, status=TaskStatus.RUNNING,
            reason="", started=number))

    def _ask(self, state: RunState, task: Task, prompt: str, schema: Mapping[str, Any],
             judged: Callable[[AgentResult], Verdict], session_id: str = "",
             ) -> tuple[RunState, Verdict | None]:
        """One attempt: counted before the call, in the ledger after it, uncounted after
        Ctrl-C, a lost sandbox or an outage (no verdict then)."""
        crew, state = self._crew, self._counted(state, task)
        number, at = state.record(task.id).started, stamp(crew.clock.now())
        limit_usd = self._config.max_cost_usd
        try:
            with crew.telemetry.span("claude_invoke", task=task.id) as note:
                result, stopped = crew.agent.ask(
                    prompt, schema=schema, session_id=session_id, model=task.model,
                    transcript=crew.store.new_transcript(task.id, number),
                    timeout_s=task.timeout_s, budget_usd=limit_usd and
                    limit_usd - state.cost_usd)
                note({"gen_ai.conversation.id": result.session_id,
                      "gen_ai.usage.output_tokens": result.usage.output,
                      "orchestrator.cost_usd": result.usage.cost_usd})
            verdict, problem = judged(result), outage(result)
            attempt = Attempt(
                number, at, round(result.duration_s, 3), result.ended, "interrupted"
                if stopped else "outage" if problem else verdict.status,
                problem.kind if problem else verdict.rule,
                shortened(problem.reason if problem else verdict.evidence),
                result.session_id, result.turns, round(result.usage.cost_usd, 6))
            self._book(state, task, attempt, result)
            spent_usd = state.cost_usd + attempt.cost_usd
            state = dataclasses.replace(state, cost_usd=spent_usd)
            if stopped:
                raise stopped
        except (Interrupted, SandboxError) as error:     # neither is the task's fault
            charge = isinstance(error, Interrupted) and not error.by_hand
            self._save(state.updated(task.id, started=number - (not charge)))
            raise
        self._tell(f"  {task.id}  {attempt.status} by rule {attempt.rule} after "
                   f"{duration_text(result.duration_s)}, ${attempt.cost_usd:.2f}: "
                   f"{shortened(' '.join(attempt.evidence.split()), 160)}")
        if problem:
            return self._put_off(state, task, problem), None
        attempts = (*state.record(task.id).attempts, attempt)
        self._outages = self._losses = 0
        return state.updated(task.id, attempts=attempts, base=state.head), verdict

    def _book(self, state: RunState, task: Task, attempt: Attempt, result: AgentResult,
              **more: Any) -> None:
        """One line of the ledger: what one agent call was for, gave and cost."""
        said, models = dataclasses.asdict(attempt), result.models.items()
        self._crew.ledger.append({
            "v": 1, "at": said.pop("started_at"), "milestone": state.milestone,
            "run": state.started_at, "task": task.id, "attempt": said.pop("number"),
            **said, "tokens": result.usage.tokens, "models": {
                name: dataclasses.asdict(usage) for name, usage in models}, **more})

    def _put_off(self, state: RunState, task: Task, problem: Outage) -> RunState:
        """The wait saved, the attempt uncounted; a question if none is a cure."""
        config, now = self._config, self._crew.clock.now()
        state = state.updated(task.id, started=state.record(task.id).started - 1)
        if problem.kind is OutageKind.PERSON:
            return self._save(state.updated(
                task.id, status=TaskStatus.NEEDS_HUMAN, answer="", question=Question(
                    f"Claude Code cannot work: {problem.reason}", (CURED,), CURED)))
        self._outages += 1
        wait_s = retry_delay_s(problem, self._outages, now=now.timestamp(), delays_s=
                               config.outage_delays_s, limit_wait_s=config.limit_wait_s)
        until_s = now.timestamp() + wait_s if wait_s is not None else (
            problem.resets_at and problem.resets_at + LIMIT_MARGIN_S)
        until = stamp(datetime.fromtimestamp(until_s, UTC)) if until_s else ""
        state = self._save(dataclasses.replace(state, wait=Wait(problem.reason, until)))
        if wait_s is None:
            raise OutageError(f"the API is not available: {problem.reason}",
                              hint=f"start again after {until or 'a while'}")
        return state

    def _sit_out(self, state: RunState) -> RunState:
        """Wait as saved, maybe by an earlier run."""
        wait, clock = state.wait, self._crew.clock
        if wait and (left_s := left_to_wait_s(wait, clock.now())) > 0:
            told = f"{wait.reason}: going on at {wait.until}"
            self._tell(told)
            if left_s > LONG_WAIT_S:
                self._crew.notifier.tell("waiting", state.milestone, told)
            clock.sleep(left_s)
            if left_s > LONG_WAIT_S:
                self._crew.notifier.tell("resumed", state.milestone, wait.reason)
        return dataclasses.replace(state, wait=None)

    def _gates(self, task: Task) -> str:
        """Run gates until one fails; its command and output, or ''."""
        sandbox, timeout_s = self._crew.sandbox, task.timeout_s or GATE_TIMEOUT_S
        for gate in task.gates:
            done = sandbox.sh(gate, timeout_s=timeout_s, is_gate=True)
            sandbox.sweep()
            how = f"exit {done.exit_code}" if done.ended is Ended.EXIT else done.ended
            told = f"gate `{shortened(' '.join(gate.split()), 80)}`: {how}"
            self._tell(f"  {task.id}  {told}")
            if how != "exit 0":
                return f"{told}\n{shortened(done.output)}"
        return ""

def stop_reason(config: Config, state: RunState, record: TaskRecord) -> str:
    """Why no further attempt may start, or ''."""
    if 0 < config.max_cost_usd <= state.cost_usd:
        return f"money limit: ${state.cost_usd:.2f} spent of ${config.max_cost_usd:.2f}"
    return detect_loop(record, max_attempts=config.max_attempts,
                       same_from=config.error_similarity)

def in_flight(record: TaskRecord) -> str:
    """The last attempt's verdict, while its uncommitted work is in the workspace."""
    judged = (a.status for a in record.attempts if a.number == record.started)
    return next(judged, "") if record.base else ""

def without_work(state: RunState) -> RunState:
    """The state when the workspace goes back under whatever was in flight."""
    return dataclasses.replace(state, tasks={
        i: record if record.status is TaskStatus.COMPLETED else
        dataclasses.replace(record, base="") for i, record in state.tasks.items()})

# ==== 17. E2E runner ================================================= [flow]
class E2ERunner(TaskRunner):
    """Has the scenario carried out by a fresh session; gates outrank its word."""
    def _settle(self, state: RunState, task: Task) -> RunState | None:
        """Only a person's plain word that it passed counts as passed."""
        record = state.record(E2E_ID)
        if record.status is not TaskStatus.NEEDS_HUMAN:
            return None
        passed = record.answer == PASSED_BY_HAND
        return self._save(state.updated(
            E2E_ID, status=TaskStatus.COMPLETED if passed else TaskStatus.FAILED,
            reason=f"a person said: {record.answer}"))

    def _attempt(self, state: RunState, task: Task, guidance: str) -> RunState:
        """Gates first: one that fails has failed the scenario, for free: no attempt."""
        state, self._is_clean = self._roll_back(state, task), not task.gates
        if evidence := self._gates(task):
            return self._fail(state, task, evidence)
        prompt = e2e_prompt(self._plan, task, state.record(E2E_ID).started + 1)
        state, verdict = self._ask(state, task, prompt, E2E_SCHEMA, judge_e2e)
        if verdict is None:
            return state
        if verdict.status is VerdictStatus.FAILED:
            return self._fail(state, task, verdict.evidence)
        status, asked = TaskStatus.COMPLETED, verdict.question
        if asked:
            asked = dataclasses.replace(asked, options=(*asked.options, PASSED_BY_HAND))
            status = TaskStatus.NEEDS_HUMAN
        return self._roll_back(self._save(state.updated(
            E2E_ID, status=status, question=asked, answer="")), task)

# ==== 18. Milestone runner =========================================== [flow]
class MilestoneRunner:
    """Tasks in plan order, then E2E; stops at the first that does not complete."""
    def __init__(self, crew: Crew, plan: Plan) -> None:
        self._crew, self._plan = crew, plan

    def run(self, state: RunState, task: Task | None = None, guidance: str = "",
            ) -> RunState:
        """The state when nothing is left to do; a `task` alone has its count anew."""
        state = self._begun(state)
        if task:
            records = {i: record for i, record in state.tasks.items() if i != E2E_ID}
            if (old := state.record(task.id)).status in OVER:
                records[task.id] = TaskRecord(question=old.question, answer=old.answer)
            state = dataclasses.replace(state, tasks=records)
        tasks, e2e = (kind(self._crew, self._plan) for kind in (TaskRunner, E2ERunner))
        for step in (task,) if task else self._plan.steps:
            if state.record(step.id).status is not TaskStatus.COMPLETED:
                runner = e2e if step.id == E2E_ID else tasks
                state = runner.run(state, step, guidance=guidance)
            if state.record(step.id).status is not TaskStatus.COMPLETED:
                break
        return state

    def _begun(self, state: RunState) -> RunState:
        """Sandbox ready, on the milestone's branch; what a crash left accounted for."""
        crew, sandbox = self._crew, self._crew.sandbox
        sandbox.open()
        if not state.base:
            kept_as = ref(state.milestone, "replaced", stamp(crew.clock.now()))
            base = sandbox.start_branch(state.branch, crew.config.base, kept_as=kept_as)
            return crew.store.save(dataclasses.replace(state, base=base, head=base))
        if not sandbox.has_commit(state.head):
            sandbox.recover(state.branch, state.head)
        if sandbox.sh('git merge-base --is-ancestor "$1" HEAD', state.head).exit_code:
            state = without_work(state)      # somebody reset the workspace meanwhile
        run = (state.milestone, state.started_at)
        spent_usd = sum(_number(e.get("cost_usd")) for e in crew.ledger.entries()
                        if (e.get("milestone"), e.get("run")) == run)
        return dataclasses.replace(state, cost_usd=max(state.cost_usd, spent_usd))

def with_plan_changes(state: RunState, plan: Plan) -> tuple[RunState, tuple[str, ...]]:
    """The state matched with a plan that was edited since, and what to tell of it."""
    if state.plan_sha256 == plan.sha256:
        return state, ()
    texts = {step.id: step.sha256 for step in plan.steps}
    told = [f"{plan.path} was changed since the milestone started"]
    kept = {i: record for i, record in state.tasks.items() if record.sha256 ==
            texts.get(i) or record.status is TaskStatus.COMPLETED and i != E2E_ID}
    for i, record in state.tasks.items():
        if i not in texts:
            told.append(f"task {i} is no longer in the plan")
        elif i not in kept:
            told.append(f"task {i} was edited; its attempts start anew")
        elif record.sha256 != texts[i]:
            told.append(f"task {i} is completed, but its text was edited since; "
                        f"`task {plan.path} {i}` does it again")
    return dataclasses.replace(state, tasks=kept, plan_sha256=plan.sha256), tuple(told)

def exit_code(plan: Plan, state: RunState) -> ExitCode:
    """What a milestone's state means to the shell."""
    statuses = {state.record(step.id).status for step in plan.steps}
    if TaskStatus.NEEDS_HUMAN in statuses:
        return ExitCode.NEEDS_HUMAN
    return ExitCode.OK if statuses <= {TaskStatus.COMPLETED} else ExitCode.FAILED

# ==== 19. Command line ================================================ [cli]
@dataclass(frozen=True, slots=True)
class World:
    """What a command works with: arguments, settings, and the outside."""
    args: argparse.Namespace
    config: Config
    sources: Mapping[str, str]
    environ: Mapping[str, str]
    clock: Clock
    processes: Processes
    terminal: Terminal
    reporter: Reporter

    def store(self, milestone: str) -> StateStore:
        return StateStore(self.config.state_dir, milestone, self.clock)
    def lock(self, milestone: str) -> RunLock:
        return RunLock(self.config.state_dir / f"{milestone}.lock", self.clock)

    def sandbox(self, state: RunState | None = None) -> DockerSandbox | LocalSandbox:
        """The kind the milestone was started in, unless a setting says otherwise."""
        is_kept = state and self.sources["sandbox"] == "default"
        if (state if state and is_kept else self.config).sandbox == "docker":
            return self.docker()
        folder = self.store(state.milestone if state else "").folder / "workspace"
        return LocalSandbox(self.processes, self.clock, repo=Path(self.config.repo),
                            folder=folder, environ=self.environ)

    def docker(self) -> DockerSandbox:
        return DockerSandbox(self.processes, self.clock, environ=self.environ,
                             compose_files=self.config.compose_files,
                             key_by=self.config.key_by)
    def run(self, *argv: str, **options: Any) -> ProcessResult:
        return self.processes.run(Command(argv=argv), **options)
    def show(self, value: Any, text: str = "") -> None:
        told = json.dumps(value, indent=2, default=str) if self.args.json else ""
        self.reporter.answer(told or text or shown(value))

def shown(value: Any) -> str:
    """A JSON value for a person: an object as lines, a list of objects as a table."""
    if isinstance(value, dict):
        told = [(k, shown(v)) for k, v in value.items() if v or v in (0, False)]
        return "\n".join(f"{k}:\n{textwrap.indent(v, '  ')}" if "\n" in v else
                         f"{k}: {v}" for k, v in told)
    if not isinstance(value, list | tuple):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if not value or not isinstance(value[0], dict):
        return ", ".join(map(shown, value))
    return table_text(tuple(value[0]), [[*map(shown, row.values())] for row in value])

def contents(name: str | Path) -> bytes:
    """Of a file that a person named, - for standard input. Raises UsageError."""
    try:
        with open(0 if str(name) == "-" else name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}", hint="name a file") from None

def read_plan(world: World, *, is_to_run: bool = False) -> Plan:
    """The plan with its errors in it; those of a plan that is to be run are raised."""
    path: Path = world.args.plan
    plan = parse_plan(decode_plan(contents(path), path=path), path=path)
    for problem in plan.warnings if is_to_run else ():
        world.reporter.progress(f"warning: {path}:{problem.line}: {problem.message}")
    if plan.errors and is_to_run:
        told = (f"{path}:{p.line}: {p.message}" for p in plan.errors)
        raise UsageError("\n".join(told), hint=plan.errors[0].hint)
    return plan

def cmd_run(world: World) -> ExitCode:
    """`run`, `resume` and `task`."""
    args, plan = world.args, read_plan(world, is_to_run=True)
    task = next((task for task in plan.tasks if task.id == args.id), None)
    if args.name == "task" and not task:
        raise UsageError(f"{plan.path} has no task {args.id!r}", hint="see `check`")
    part = dataclasses.replace(plan, tasks=(task,), e2e=None) if task else plan
    with world.lock(plan.milestone):
        state = begun(world, plan)
        if not task and exit_code(plan, state) is ExitCode.OK:
            world.reporter.progress("the milestone is completed; --fresh starts over")
            return ExitCode.OK
        for i, asked in () if world.terminal.is_interactive() else questions(
                state).items():
            if not (recommended(world.config, asked) or task and task.id != i):
                told = f"task {i} asks: {shortened(' '.join(asked.text.split()), 160)}"
                world.reporter.progress(f"{told}; status {plan.path} shows it whole")
                return ExitCode.NEEDS_HUMAN
        if (wait := state.wait) and left_to_wait_s(
                wait, world.clock.now()) > world.config.limit_wait_s:
            raise OutageError(f"the API is not available: {wait.reason}",
                              hint=f"start again after {wait.until}")
        for step in () if task else plan.steps:
            record = state.record(step.id)
            if record.status is TaskStatus.FAILED and (
                    reason := stop_reason(world.config, state, record)):
                raise OrchestratorError(
                    f"task {step.id} {reason}", hint="raise that limit, edit the task, "
                    f"or {PROGRAM} task {plan.path} ID --guidance TEXT")
        return exit_code(part, work(world, plan, state, task))

def begun(world: World, plan: Plan) -> RunState:
    """The state to go on from; an answer is saved, whatever the sandbox does next."""
    args, store, tell = world.args, world.store(plan.milestone), world.reporter
    state = None if args.fresh else store.load()
    if state is None and args.name == "resume":
        raise StateError(f"no saved {store.path}", hint=f"{PROGRAM} run {plan.path}")
    left = [step.id for step in plan.steps
            if state and state.record(step.id).status is not TaskStatus.COMPLETED]
    if args.fresh or (
            args.name == "run" and left and world.terminal.is_interactive() and (
            world.terminal.ask(f"Resume from Task {left[0]}? [Y/n] ") or "y"
            ).strip().lower().startswith("n")):
        state = None
        if target := store.archive():
            tell.progress(f"the earlier run was moved to {target}")
    state, changes = with_plan_changes(state or RunState(
        plan.milestone, str(plan.path), plan.sha256,
        plan.branch or f"orchestrator/{git_name(plan.milestone)}",
        world.config.sandbox, stamp(world.clock.now())), plan)
    for change in changes:
        tell.progress(f"warning: {change}")
    if args.answer is not None:          # '' is --skip
        task_id, asked = next(iter(questions(state).items()), ("", Question("")))
        if not task_id or not (answer := chosen_answer(args.answer, asked)):
            raise UsageError(f"task {task_id}: the agent recommended nothing" if task_id
                             else "no question is waiting for an answer",
                             hint=f"{PROGRAM} status {plan.path}")
        state = store.save(state.updated(task_id, answer=answer))
    return state

def work(world: World, plan: Plan, state: RunState, task: Task | None) -> RunState:
    """Wire the adapters, run, leave nothing behind however it ends, and sum up."""
    reporter, config, sandbox = world.reporter, world.config, world.sandbox(state)
    for t in plan.tasks:
        if t.mark and not state.record(t.id).started:
            reporter.progress(f"warning: {t.id} is marked {t.mark}, but is run")
    if isinstance(sandbox, LocalSandbox):
        argv = local_command(shlex.split(config.claude))
        config = dataclasses.replace(config, claude=shlex.join(argv))
    agent = ClaudeAgent(sandbox, world.processes, config, on_tool=reporter.tool,
                        on_silence=reporter.silence)
    telemetry = Telemetry(world.environ, reporter.progress)
    notifier = Notifier(world.processes, config, reporter.progress)
    runner = MilestoneRunner(Crew(
        agent, sandbox, world.store(plan.milestone),
        Ledger(config.state_dir / "ledger.jsonl"), EscalationDesk(
            world.terminal, reporter, config), notifier, reporter, telemetry,
        world.clock, config), plan)
    try:
        with contextlib.closing(telemetry), contextlib.closing(sandbox), \
                telemetry.span("milestone", milestone=plan.milestone):
            state = runner.run(state, task, world.args.guidance)
    except (SandboxError, OutageError, StateError) as error:
        notifier.tell("interrupted", plan.milestone, f"{error}; {error.hint}")
        raise
    report = status_json(state, plan, False)
    asked = [question_text(i, dataclasses.asdict(question))
             for i, question in questions(state).items()]
    notifier.tell("question" if asked else report["status"], plan.milestone,
                  "\n".join(asked) or status_text(report))
    after = {"completed": "fetch {}", "needs_human": "resume {} --answer TEXT"}
    with contextlib.suppress(BrokenPipeError, OrchestratorError):    # nobody reads it
        reporter.answer(f"{status_text(report)}\nnext: {PROGRAM} " + after.get(
            report["status"], "logs {}").format(plan.path))
    return state

def cmd_check(world: World) -> ExitCode:
    """read the plan, or probe the tools; change nothing"""
    if world.args.plan:
        plan = read_plan(world)
        report = plan_report(plan)
        tasks = [{"id": t.id, "line": t.line, "criteria": len(t.criteria), "gates":
                  len(t.gates), "mark": t.mark, "title": t.title} for t in plan.tasks]
        world.show(report, shown(report | {"tasks": tasks}))
        return ExitCode.USAGE if plan.errors else ExitCode.OK
    sandbox, claude = world.sandbox(), shlex.split(world.config.claude)
    commands: dict[str, Sequence[str]] = {"git": ("git", "--version")}
    if isinstance(sandbox, LocalSandbox):
        commands["claude"] = (*local_command(claude), "--version")
    else:
        inside = sandbox.composed("exec", "-T", *sandbox.variables, "sandbox").argv
        commands |= {"engine": ("docker", "version", "--format", "{{.Server.Version}}"),
                     "claude in the sandbox": (*inside, *claude, "--version"),
                     "repository in the sandbox": (*inside, "git", "log", "-1"),
                     "volumes in the sandbox": (*inside, "workspace.py", "check"),
                     "API from the sandbox": (*inside, "workspace.py", "reach")}
    probes = []
    for name, argv in commands.items():      # env says which program is missing
        done = world.run("/usr/bin/env", *argv, timeout_s=PROBE_TIMEOUT_S)
        probes.append({"name": name, "ok": done.exit_code == 0,
                       "told": (done.output or done.ended).splitlines()[-1]})
    settings = [{"name": name, "value": value, "source": world.sources[name]}
                for name, value in dataclasses.asdict(world.config).items()]
    endpoint = world.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "off")
    world.show({"probes": probes, "settings": settings, "telemetry": endpoint})
    return ExitCode.OK if all(p["ok"] for p in probes) else ExitCode.SANDBOX

def cmd_status(world: World) -> None:
    """where a milestone stands, or every one"""
    plan = read_plan(world) if world.args.plan else None
    files, found = world.config.state_dir.glob("*_state.json"), []
    names = (path.name.removesuffix("_state.json") for path in sorted(files))
    for name in [plan.milestone] if plan else names:
        if (state := world.store(name).load()) is None:
            raise StateError(f"no saved state of milestone {name}", hint="run it")
        found.append(status_json(state, plan, bool(world.lock(name).owner())))
    world.show(found[0] if plan else found,
               "\n\n".join(map(status_text, found)) or "no milestones yet")

def cmd_costs(world: World) -> None:
    """`costs` and `history`: the ledger's calls and money, summed up by key."""
    args, by = world.args, world.args.by
    rows: dict[str, dict[str, Any]] = {}
    for entry in Ledger(world.config.state_dir / "ledger.jsonl").entries():
        milestone, task, run, at = (
            str(entry.get(key)) for key in ("milestone", "task", "run", "at"))
        key = {"milestone": milestone, "task": f"{milestone} {task}", "day": at[:10],
               "run": f"{milestone} {run}"}.get(by, "unknown")
        parts = by == "model" and _object(entry.get("models")) or {key: entry}
        for name, part in parts.items() if at >= str(args.since or "") else ():
            row = rows.setdefault(name, {by: name, "calls": 0, "cost_usd": 0.0})
            cost_usd = row["cost_usd"] + _number(_object(part).get("cost_usd"))
            row["cost_usd"] = round(cost_usd, 6)
            row["calls"] += entry.get("kind") != "gate"
            if by == "run":
                row |= {"milestone": milestone, "started_at": run, "last_call_at": at,
                        "last_task": task, "last_status": entry.get("status")}
    total_usd = round(sum(row["cost_usd"] for row in rows.values()), 6)
    world.show([*rows.values()] if by == "run" else {
        "total_usd": total_usd, f"by_{by}": [*rows.values()]},
        f"{total_usd:.2f}" if args.total else "")

def followed(world: World, file: BinaryIO, lock: RunLock) -> Iterator[bytes]:
    yield from file
    while world.args.follow and lock.owner():
        world.clock.sleep(0.2)
        yield from file

def cmd_logs(world: World) -> None:
    """what the agent said, did and saw in the latest attempt"""
    plan, task_id = read_plan(world), world.args.id
    store = world.store(plan.milestone)
    name = task_id and store.transcript(task_id, 0).stem.removesuffix("-0")
    found = [path for path in store.folder.glob("*.ndjson")
             if name in (None, path.stem.rpartition("-")[0])]
    if not found:
        raise UsageError(f"no transcript of {task_id or 'a task'} in {store.folder}",
                         hint=f"{PROGRAM} status {plan.path}")
    latest = max(found, key=lambda path: path.stat().st_mtime_ns)
    with latest.open("rb") as file:
        lines = followed(world, file, world.lock(plan.milestone))
        texts = readable_events(lines) if not world.args.json else (
            line.decode("utf-8", "replace").rstrip("\n") for line in lines)
        for text in texts:
            world.reporter.answer(text)

def cmd_explain(world: World) -> None:
    """the verdict on one recorded stream, and why"""
    result = read_transcript(world.args.file, [contents(world.args.file)])
    verdict, problem = judge(result), outage(result)
    same = "session_id turns ended exit_code duration_s events bad_lines".split()
    world.show({
        "status": "outage" if problem else verdict.status, "rule": verdict.rule,
        "evidence": shortened(verdict.evidence),
        "question": verdict.question and dataclasses.asdict(verdict.question),
        "outage": problem and dataclasses.asdict(problem),
        "cost_usd": round(result.usage.cost_usd, 6), "tokens": result.usage.tokens,
        "models": {name: round(u.cost_usd, 6) for name, u in result.models.items()},
        **{name: getattr(result, name) for name in same}, "stderr": result.stderr_tail})

def cmd_fetch(world: World) -> None:
    """bring the milestone's branch out of the sandbox"""
    plan, git = read_plan(world), ("git", "-C", world.args.into or world.config.repo)
    store = world.store(plan.milestone)
    target = f"orchestrator/{git_name(plan.milestone)}"
    if not (state := store.load()) or state.head == state.base:
        raise StateError(f"milestone {plan.milestone} has no work to fetch",
                         hint=f"{PROGRAM} run {plan.path}")
    lacks_base = world.run(*git, "cat-file", "-e", state.base).exit_code
    bundle = store.folder.absolute() / "fetch.bundle"
    write_atomically(bundle, world.sandbox(state).bundle(
        state.head, "" if lacks_base else state.base))
    done = world.run(
        *git, "fetch", "-q", "--no-tags", "--no-write-fetch-head", str(bundle),
        f"{'+' * world.args.force}{BUNDLED}:refs/heads/{target}")
    bundle.unlink()
    if done.exit_code != 0:
        raise UsageError(f"git fetch: {shortened(done.output)}", hint="--force replaces"
                         f" {target}; --into names a repository that is not on it")
    world.reporter.answer(f"branch {target} is at {state.head[:10]}")

def cmd_sandbox(world: World) -> ExitCode:
    """the docker sandbox: init builds, starts, clones; reset cleans; down keeps data"""
    config, action, docker = world.config, world.args.action, world.docker()
    if action in ("shell", "claude"):
        docker.compose("ps", "-q")       # says what is wrong, if docker is unusable
        program = ["bash"] if action == "shell" else shlex.split(config.claude)
        inside = ("exec", *docker.variables, "sandbox", *program, *world.args.rest)
        os.execvp("docker", docker.composed(*inside).argv)
    if action == "status":
        up = bool(docker.compose("ps", "-q", "--status", "running", "sandbox").stdout)
        head = docker.sh("git log -1 --format='%h %s'").output if up else ""
        world.show({"running": up, "workspace": head})
        return ExitCode.OK if up else ExitCode.SANDBOX
    if not world.args.force:
        docker.hold()
    if action == "init":
        world.reporter.answer(sandbox_init(world, docker))
    elif action == "reset":
        started, report = world.clock.monotonic(), dict(docker.reset())
        report["duration_s"] = round(world.clock.monotonic() - started, 3)
        world.show(report)
    else:
        docker.compose(*(("down", "-t", "0") if action == "down" else _UP))
        world.reporter.progress(f"sandbox {action}: done")
    docker.release()
    return ExitCode.OK

def sandbox_init(world: World, docker: DockerSandbox) -> str:
    """Build, start, clone, verify; harmless to repeat, goes on where it failed."""
    repo, tell = world.config.repo, world.reporter.progress
    tell("1/3 container: its image is built if there is none")
    if world.args.rebuild:
        docker.compose("build", timeout_s=SLOW_TIMEOUT_S)
    docker.compose("up", "-d", timeout_s=SLOW_TIMEOUT_S)
    docker.bring_up()
    tell(f"2/3 repository: {repo}")
    if "://" in repo or re.match(r"[\w.-]+@[\w.-]+:", repo):
        done = docker.janitor("fill", repo)
    else:
        git = ("git", "-C", repo)
        home = world.run(*git, "symbolic-ref", "--short", "HEAD").stdout.decode()
        bundle = world.run(
            *git, "bundle", "create", "-q", "-", "HEAD", "--branches", "--tags",
            timeout_s=SLOW_TIMEOUT_S, max_bytes=sys.maxsize).checked(
            f"no bundle of {repo}", hint="--repo names one with a commit").stdout
        done = docker.janitor("fill", "--home", home.strip() or "main", stdin=bundle)
    tell("3/3 checks: volumes, the agent, login")
    checked = json.loads(docker.sh("workspace.py check").stdout)
    if problems := checked["problems"]:
        raise SandboxError("; ".join(problems), hint="init --rebuild, or look at .env")
    if not checked["login"] and not any(map(world.environ.get, KEYS)):
        tell(f"nobody is logged in yet: {PROGRAM} sandbox claude, then /login")
    return (f"sandbox ready: repository {done['mirror']}, /workspace "
            f"{done['workspace']}, claude {checked['claude']}")

def local_command(argv: Iterable[str]) -> list[str]:
    """Paths in a command made absolute, because the agent starts in its workspace."""
    return [os.path.abspath(part) if "/" in part and os.path.exists(part) else part
            for part in argv]

_ARGUMENTS: dict[str, str | dict[str, Any]] = {    # words alone: a switch
    "plan": {"metavar": "PLAN", "type": Path}, "id": {"metavar": "ID"},
    "file": {"metavar": "FILE", "type": Path, "help": "a stream; - for standard input"},
    "rest": {"nargs": "*", "help": "arguments for it, after --"},
    "--json": "for machines", "--total": "one number", "--rebuild": "the image too",
    "--follow": "as it grows", "--fresh": "archive the earlier run and start over",
    "--force": "even so: under a run, over a branch that differs",
    "--into": {"metavar": "REPO", "default": "", "help": "default: --repo"},
    "--answer": {"dest": "answer", "metavar": "TEXT", "help": "to the parked question"},
    "--answer-file": {"dest": "answer", "metavar": "FILE",
                      "type": lambda name: contents(name).decode(errors="replace")},
    "--skip": {"dest": "answer", "action": "store_const", "const": "",
               "help": "take the agent's recommendation"},
    "--guidance": {"metavar": "TEXT", "default": "", "help": "said to the agent"},
    "--by": {"choices": ("milestone", "task", "model", "day"), "default": "milestone"},
    "--since": {"metavar": "2026-01-31", "type": datetime.fromisoformat}}
_CLI: tuple[tuple[str, Callable[[World], ExitCode | None], str, str], ...] = (
    ("run", cmd_run, "start a milestone, or go on", "plan --fresh"),
    ("resume", cmd_run, "go on, or answer first", "plan --answer --answer-file --skip"),
    ("task", cmd_run, "run one task", "plan id --guidance"),
    ("check", cmd_check, "", "plan? --json"),
    ("status", cmd_status, "", "plan? --json"),
    ("history", cmd_costs, "past runs, oldest first", "--json"),
    ("costs", cmd_costs, "what was spent", "--json --by --since --total"),
    ("logs", cmd_logs, "", "plan id? --json --follow"),
    ("explain", cmd_explain, "", "file --json"),
    ("fetch", cmd_fetch, "", "plan --into --force"),
    *((f"sandbox {action}", cmd_sandbox, "", arguments) for action, arguments in {
        "init": "--rebuild", "up": "--force", "reset": "--json --force", "shell":
        "rest", "claude": "rest", "status": "--json", "down": "--force"}.items()))

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")

def build_parser() -> argparse.ArgumentParser:
    """Every command with every flag."""
    settings = _Parser(add_help=False)
    group = settings.add_argument_group("settings (flag, ORCHESTRATOR_*, ini file)")
    group.add_argument("--config", metavar="FILE",
                       help="ini file (default: orchestrator.ini beside the state)")
    for s in SETTINGS:
        default = shown(getattr(Config(), s.name)).replace(", ", "/") or "none"
        group.add_argument(setting_flag(s.name), dest=s.name,
                           metavar="|".join(s.metadata["choices"]) or "VALUE",
                           help=f"{s.metadata['help']} (default: {default})")
    parser = _Parser(prog=PROGRAM, description="Run a milestone plan with Claude Code.",
                     formatter_class=argparse.RawTextHelpFormatter,
                     epilog=f"examples: {PROGRAM} run plan.md --max-cost-usd 20\n"
                     f'          {PROGRAM} resume plan.md --answer "use SQLite"\n\n'
                     f"{(__doc__ or '').split(2 * chr(10))[3]}")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(answer=None, fresh=False, json=False, total=False, by="run",
                        since=None, id=None, force=False, guidance="")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    sandbox = commands.add_parser("sandbox", help=cmd_sandbox.__doc__)
    actions = sandbox.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, act, told, arguments in _CLI:
        told = told or act.__doc__ or ""
        sub = (actions if " " in name else commands).add_parser(
            name.rpartition(" ")[2], parents=[settings], help=told, description=told)
        sub.set_defaults(act=act)
        answers = sub.add_mutually_exclusive_group() if name == "resume" else sub
        for argument in arguments.split():      # with a "?" it may be left out
            given = _ARGUMENTS[argument.rstrip("?")]
            options = {"action": "store_true", "help": given} if isinstance(
                given, str) else given | ({"nargs": "?"} if "?" in argument else {})
            into = answers if "dest" in options else sub
            into.add_argument(argument.rstrip("?"), **options)
    return parser

def read_settings(args: argparse.Namespace, environ: Mapping[str, str],
                  ) -> tuple[Config, dict[str, str]]:
    """The settings from flags, environment and ini file. Raises UsageError."""
    state_dir = args.state_dir or environ.get("ORCHESTRATOR_STATE_DIR") or "state"
    path = Path(args.config or Path(state_dir).parent / "orchestrator.ini")
    ini = configparser.ConfigParser(interpolation=None, default_section="orchestrator")
    source, flags = str(path), {s.name: getattr(args, s.name) for s in SETTINGS}
    try:
        if args.config or path.exists():
            ini.read_string(contents(path).decode(), source=source)
        if others := ini.sections():
            raise ValueError(f"unknown section [{', '.join(others)}]")
        resolved = resolve_config(flags, environ, ini.defaults(), file_name=source)
        source = f"--claude {resolved[0].claude!r}"
        shlex.split(resolved[0].claude)
        return resolved
    except (ValueError, configparser.Error) as error:
        raise UsageError(f"{source}: {error}", hint="settings stand in a file under "
                         "[orchestrator]; commands are quoted as in a shell") from None

def main(argv: Sequence[str] | None = None) -> int:
    """Turn every ending into an exit status; only --help and --version exit."""
    clock, environ = Clock(), os.environ
    secrets = [value.encode() for name, value in environ.items()
               if re.fullmatch(r"(ANTHROPIC|CLAUDE_CODE)_\w*(KEY|TOKEN)", name)
               and len(value) >= MIN_SECRET_CHARS]
    out, err = (stream or open(os.devnull, "w", encoding="utf-8")     # if closed
                for stream in (sys.stdout, sys.stderr))
    reporter = Reporter(out, err, clock, environ=environ)
    try:
        install_signal_handlers()
        args = build_parser().parse_args(argv)
        return int(args.act(World(
            args, *read_settings(args, environ), environ, clock, Processes(
                clock, secrets), Terminal(sys.stdin, err), reporter)) or 0)
    except OrchestratorError as error:
        reporter.error(error)
        return error.exit_code
    except BrokenPipeError:      # `... | head` has seen enough
        return ExitCode.OK
    except Exception:            # the boundary: shown in full, never hidden
        told = f"{traceback.format_exc()}This is a bug; the state is as last saved"
        reporter.error(OrchestratorError(told, hint="report it and start again"))
        return ExitCode.INTERNAL

if __name__ == "__main__":
    raise SystemExit(main())
