"""Hand-written stand-ins for the adapters of a flow. No mock library, no patching."""
from __future__ import annotations

import dataclasses
import io
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ktrdr_orchestrator as ko


class Crash(BaseException):
    """kill -9: nothing but a test catches it."""


class FakeClock(ko.Clock):
    """Time moves only when somebody sleeps; `crashes` makes the next sleep the last."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.crashes: BaseException | None = None
        self._now = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._now.timestamp()

    def sleep(self, seconds: Any) -> None:
        if self.crashes:
            raise self.crashes
        self.slept.append(seconds)
        self._now += timedelta(seconds=seconds)


class FakeTerminal(ko.Reporter):
    """A person who types these lines, then closes the input; no lines: nobody there."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self._is_interactive = bool(lines)
        self.prompts: list[str] = []
        self.connect(io.StringIO(), FakeClock())

    def connect(self, told: io.StringIO, clock: FakeClock) -> None:
        super().__init__(told, told, clock)

    def is_interactive(self) -> bool:
        return self._is_interactive

    def ask(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        return self._lines.pop(0) if self._lines else None


class MemoryLedger(ko.Ledger):
    """The lines, in a list."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def append(self, state: ko.RunState, at: str, **about: Any) -> None:
        self.lines.append({"v": 1, "at": at, "milestone": state.milestone,
                           "run": state.started_at, **about})

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """The agent's calls and the gates' word on them, without waits and such."""
        return [line for line in self.lines if "cost_usd" in line]

    def entries(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.lines)


def totals_of(lines: Iterable[Mapping[str, Any]], milestone: str) -> ko.Totals:
    return ko.counted({}, ({"milestone": milestone}, *lines))


class MemoryStore(ko.StateStore):
    """Every saved state, in a list. `crash_at` names saves (1, 2, ...) that never
    happen, `crash_after` saves whose caller never hears of them."""

    def __init__(self, clock: ko.Clock, folder: Path = Path("transcripts")) -> None:
        super().__init__(folder, "m", clock)
        self.saved: list[ko.RunState] = []
        self.tried = 0
        self.crash_at: frozenset[int] = frozenset()
        self.crash_after: frozenset[int] = frozenset()

    def save(self, state: ko.RunState) -> ko.RunState:
        self.tried += 1
        if self.tried in self.crash_at:
            raise Crash
        self.saved.append(state)
        if self.tried in self.crash_after:
            raise Crash
        return state

    def load(self) -> ko.RunState | None:
        return self.saved[-1] if self.saved else None


class FakeSandbox(ko.Sandbox):
    """A workspace of named pieces of work: `dirty` ones over those in commit `head`.

    Commits and refs are sets of pieces. `gates` says what a gate's next runs come to
    (exit codes; 0 when none is left).
    """

    name = "fake sandbox"

    def __init__(self, **gates: Sequence[int]) -> None:
        self.calls: list[str] = []
        self.commits: dict[str, frozenset[str]] = {}
        self.parents: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.refs: dict[str, frozenset[str]] = {}
        self.head = ""
        self.dirty: set[str] = set()
        self.gates = {gate: list(codes) for gate, codes in gates.items()}
        self.gate_timeouts_s: list[float] = []
        self.gate_ended = ko.Ended.EXIT
        self.losses: list[bool] = []     # whether the next sweeps find it gone
        self.changes = ""                # what `git diff` says of the milestone

    @property
    def work(self) -> frozenset[str]:
        return self.commits.get(self.head, frozenset()) | self.dirty

    def log(self, commit: str) -> list[str]:
        """The messages of a commit and those before it, latest first."""
        return [self.messages[c] for c in self._line(commit) if c in self.messages]

    def reset(self) -> None:
        """As `sandbox reset` does: clean, on another branch."""
        self.head, self.dirty = "elsewhere", set()

    def open(self) -> None:
        self.calls.append("open")

    def sweep(self) -> ko.SandboxLostError | None:
        return lost() if self.losses and self.losses.pop(0) else None

    def start_branch(self, branch: str, base: str, *, kept_as: str) -> str:
        self.head = "c0"
        self.commits["c0"] = frozenset()
        return "c0"

    def checkpoint(self, branch: str, base: str, *, ref: str, message: str) -> str:
        self.calls.append(f"checkpoint {ref.rpartition('/')[2]}")
        if self.dirty or not self._descends(base):
            commit = f"c{len(self.commits)}"
            parent = self.head if self._descends(base) else base
            self.commits[commit], self.parents[commit] = self.work, parent
            self.head, self.dirty = commit, set()
            self.messages[commit] = message
        self.refs[ref] = self.work
        return self.head

    def rollback(self, branch: str, base: str, *, ref: str, message: str) -> None:
        self.calls.append(f"rollback {ref.rpartition('/')[2]}")
        if self.dirty or self.head != base:
            self.refs[ref] = self.work
        self.head, self.dirty = base, set()

    def visit(self, commit: str) -> None:
        self.calls.append(f"visit {commit}")

    def diff(self, base: str, commit: str) -> str:
        return self.changes

    def has_commit(self, commit: str) -> bool:
        return commit in self.commits or commit in self.refs

    def sh(self, script: str, *args: str, timeout_s: float = 0.0,
           is_gate: bool = False, max_bytes: int = 0) -> ko.ProcessResult:
        if not is_gate:
            return ko.ProcessResult(ko.Ended.EXIT, 1 - self._descends(args[0]), 0.0)
        self.calls.append(f"gate {script}")
        self.gate_timeouts_s.append(timeout_s)
        codes = self.gates.get(script, [])
        code = codes.pop(0) if codes else 0
        said = b"gate says no" if code else b""
        return ko.ProcessResult(self.gate_ended, code, 0.0, said)

    def _descends(self, ancestor: str) -> bool:
        return ancestor in self._line(self.head)

    def _line(self, commit: str) -> Iterator[str]:
        while commit:
            yield commit
            commit = self.parents.get(commit, "")


class NewsList(ko.Notifier):
    """What somebody would have been told."""

    def __init__(self) -> None:
        self.news: list[str] = []

    def tell(self, event: str, milestone: str, text: str) -> None:
        self.news.append(event)


Outcome = ko.AgentResult | BaseException


class ScriptedAgent:
    """Comes to these outcomes in order; exceptions are raised, but handed back if they
    are a signal or the loss of the sandbox.

    Each call leaves a piece of work in the workspace, `work 1` the first; `before`
    sees it first.
    """

    def __init__(self, sandbox: FakeSandbox, *outcomes: Outcome,
                 before: Callable[[Any], object] = lambda _: None) -> None:
        self._sandbox, self.before = sandbox, before
        self.outcomes = list(outcomes)
        self.calls: list[Any] = []
        self.leaves_work = True

    def ask(self, prompt: str, **options: Any,
            ) -> tuple[ko.AgentResult, ko.Interrupted | ko.SandboxLostError | None]:
        call = SimpleNamespace(prompt=prompt, **options)
        self.before(call)
        self.calls.append(call)
        if self.leaves_work:
            self._sandbox.dirty.add(f"work {len(self.calls)}")
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, ko.Interrupted | ko.SandboxLostError):
            return cut_short(), outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome, None


def reported(cost_usd: float = 0.25, **report: Any) -> ko.AgentResult:
    """A call that ended with this structured report."""
    return ko.AgentResult(
        ended=ko.Ended.EXIT, exit_code=0, has_result=True, subtype="success",
        terminal_reason="completed", session_id="s-1", turns=3, duration_s=60.0,
        events=9, structured=report, usage=ko.Usage(10, 20, 0, 0, cost_usd))


def completed() -> ko.AgentResult:
    return reported(status="completed", summary="done")


def failed(error: str = "E-1") -> ko.AgentResult:
    return reported(status="failed", summary="no", error=error)


def asks(question: str = "Which?") -> ko.AgentResult:
    return reported(status="needs_human", summary="?", question=question,
                    options=["red", "blue"], recommendation="blue")


def cut_short() -> ko.AgentResult:
    """What a call that is stopped by a signal still says."""
    return dataclasses.replace(reported(), has_result=False, structured=None,
                               ended=ko.Ended.STOPPED)


def api_error(text: str, **fields: Any) -> ko.AgentResult:
    """A call that the API did not answer."""
    return dataclasses.replace(
        reported(), structured=None, is_error=True, terminal_reason="api_error",
        text=text, exit_code=1, **fields)


def overloaded() -> ko.AgentResult:
    return api_error("API Error: 529 overloaded", api_error_status=529)


def limited(resets_at: float) -> ko.AgentResult:
    return api_error("usage limit reached", api_error_status=429,
                     limit_resets_at=resets_at)


def logged_out() -> ko.AgentResult:
    return api_error("Not logged in · Please run /login")


def session_gone() -> ko.AgentResult:
    return dataclasses.replace(
        reported(0.0), structured=None, is_error=True, exit_code=1, turns=0,
        subtype="error_during_execution", terminal_reason="",
        text="No conversation found with session ID: s-1")


def lost() -> ko.SandboxLostError:
    return ko.SandboxLostError("the sandbox went away")


def ctrl_c() -> ko.Interrupted:
    return ko.Interrupted(signal.SIGINT)


def terminated() -> ko.Interrupted:
    return ko.Interrupted(signal.SIGTERM)


def task(task_id: str = "1.1", **fields: Any) -> ko.Task:
    return ko.Task(task_id, f"Title {task_id}", 1, 2, f"text {task_id}", **fields)


def scenario(**fields: Any) -> ko.Task:
    text = "## E2E Test\nthe scenario"
    return ko.Task(ko.E2E_ID, "E2E Test", 8, 9, **{"text": text, **fields})


def plan(*tasks: ko.Task, e2e: ko.Task | None = None) -> ko.Plan:
    """With one task unless tasks are given; its hash covers tasks and scenario."""
    tasks = tasks or (task(),)
    return ko.Plan(Path("m.md"), "m", "The milestone", str(hash((tasks, e2e))),
                   tasks=tasks, e2e=e2e)


def new_state(a_plan: ko.Plan, clock: FakeClock | ko.Clock) -> ko.RunState:
    """Nothing done yet."""
    branch = f"orchestrator/{a_plan.milestone}"
    return ko.RunState(a_plan.milestone, str(a_plan.path), a_plan.sha256, branch,
                       "local", ko.stamp(clock.now()))


def waiting(state: ko.RunState) -> list[str]:
    """The tasks whose question is parked."""
    return [task_id for task_id, record in state.tasks.items()
            if record.status is ko.TaskStatus.NEEDS_HUMAN and not record.answer]


class World:
    """A crew of fakes that outlives its runs: `run` is one start of the program."""

    def __init__(
        self, a_plan: ko.Plan, *outcomes: Outcome, config: ko.Config | None = None,
        sandbox: FakeSandbox | None = None, terminal: FakeTerminal | None = None,
        store: ko.StateStore | None = None,
    ) -> None:
        self.plan = a_plan
        self.clock = FakeClock()
        self.sandbox = sandbox or FakeSandbox()
        self.agent = ScriptedAgent(self.sandbox, *outcomes)
        self.ledger = MemoryLedger()
        self.store = store or MemoryStore(self.clock)
        self.store.ledger = self.ledger
        self.terminal = terminal or FakeTerminal()
        self.config = config or ko.Config()
        self.told = io.StringIO()
        self.notifier = NewsList()

    def crew(self) -> ko.Crew:
        self.terminal.connect(self.told, self.clock)
        telemetry = ko.Telemetry({}, self.terminal.progress, Path(self.plan.milestone))
        return ko.Crew(self.agent, self.sandbox, self.store,
                       self.notifier, self.terminal, telemetry, self.config)

    def state(self) -> ko.RunState:
        """As saved, matched with the plan, as the next start reads it."""
        fresh = new_state(self.plan, self.clock)
        return ko.with_plan_changes(self.store.load() or fresh, self.plan)[0]

    def record(self, task_id: str = "1.1") -> ko.TaskRecord:
        return self.state().record(task_id)

    def run(self, *, answer: str = "") -> ko.RunState:
        state = self.state()
        for task_id in waiting(state) if answer else ():
            state = state.updated(task_id, answer=answer)
            self.ledger.append(state, ko.stamp(self.clock.now()), task=task_id,
                               kind="answer")
        return ko.run_milestone(self.crew(), self.plan, state)

    def run_one(self, a_task: ko.Task, guidance: str = "") -> ko.RunState:
        world = self.crew(), self.plan, self.state()
        return ko.run_milestone(*world, a_task, guidance)
