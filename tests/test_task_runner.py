"""Sections 15 to 18: the order of work, whatever it is interrupted by."""
from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    Crash,
    FakeClock,
    FakeSandbox,
    FakeTerminal,
    MemoryStore,
    Outcome,
    World,
    api_error,
    asks,
    completed,
    ctrl_c,
    failed,
    limited,
    logged_out,
    lost,
    overloaded,
    plan,
    reported,
    session_gone,
    task,
    terminated,
    waiting,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import ktrdr_orchestrator as ko

NO_SPACE = ko.StateError("state: No space left on device")
PASSED, UNCLEAR = reported(status="passed"), reported(status="unclear", diagnosis="odd")
BROKEN = reported(status="failed", diagnosis="500 instead of 200")
Status = ko.TaskStatus


def rejected(world: World) -> dict[str, frozenset[str]]:
    return {name.rpartition("/")[2]: work for name, work in world.sandbox.refs.items()
            if "/rejected/" in name}


# A sandbox that goes away is nobody's fault, and no reason to stop at once.

def test_a_lost_sandbox_costs_no_attempt_and_its_cost_is_kept() -> None:
    world = World(plan(), lost(), completed())
    assert world.run().record("1.1").status is Status.COMPLETED
    assert (world.record().started, world.state().cost_usd) == (1, 0.5)
    assert [line["status"] for line in world.ledger.calls] == [
        "interrupted", "completed"]
    assert rejected(world) == {"1.1-0": frozenset({"work 1"})}


def test_a_sandbox_that_keeps_going_away_is_unusable() -> None:
    world = World(plan(), *[lost() for _ in range(9)])
    with pytest.raises(ko.SandboxLostError):
        world.run()
    assert len(world.agent.calls) == 1 + ko.MAX_LOSSES
    assert (world.record().started, world.record().attempts) == (0, ())
    assert ko.SandboxLostError.exit_code is ko.ExitCode.SANDBOX


def test_a_gate_during_which_the_sandbox_was_lost_is_run_again() -> None:
    world = World(plan(task(gates=("check",))), completed(),
                  sandbox=FakeSandbox(check=[137, 0]))
    world.sandbox.losses = [True]
    assert world.run().record("1.1").status is Status.COMPLETED
    assert world.sandbox.calls.count("gate check") == 2 and len(world.agent.calls) == 1


# Promise 1: completed only after attempt, verdict and checkpoint were saved.

def test_completed_is_the_last_thing_saved_of_a_task() -> None:
    world = World(plan(), completed())
    world.run()
    assert isinstance(world.store, MemoryStore)
    told = dict.fromkeys((r.status, r.started, len(r.attempts), r.checkpoint) for r in (
        state.record("1.1") for state in world.store.saved) if r.started)
    assert [*told] == [(Status.RUNNING, 1, 0, ""), (Status.RUNNING, 1, 1, ""),
                       (Status.COMPLETED, 1, 1, "c1")]


def test_a_verdict_that_was_saved_is_not_asked_for_again() -> None:
    world = World(plan(task(gates=("check",))), completed())
    assert isinstance(world.store, MemoryStore)
    world.store.crash_at = frozenset({5})      # branch, rollback, count, verdict, end
    with pytest.raises(Crash):
        world.run()
    assert world.sandbox.log("c1") == ["Task 1.1: Title 1.1"]
    assert world.run().record("1.1").status is Status.COMPLETED
    assert len(world.agent.calls) == 1 and len(world.sandbox.commits) == 2
    assert world.sandbox.calls.count("gate check") == 2


def test_a_gate_that_fails_makes_failed_of_completed_in_the_ledger_too() -> None:
    world = World(plan(task(gates=("check",))), completed(), completed(),
                  sandbox=FakeSandbox(check=[1, 0]))
    record = world.run().record("1.1")
    assert [(a.status, a.rule) for a in record.attempts] == [
        ("failed", "gate"), ("completed", "structured")]
    assert [(e.get("kind", "call"), e["status"], e["cost_usd"], e["attempt"])
            for e in world.ledger.calls] == [
        ("call", "completed", 0.25, 1), ("gate", "failed", 0.0, 1),
        ("call", "completed", 0.25, 2), ("gate", "completed", 0.0, 2)]
    assert "gate says no" in world.agent.calls[1].prompt


def test_a_gate_that_ran_out_of_time_failed_whatever_its_exit_status() -> None:
    world = World(plan(task(gates=("check",), timeout_s=7.0)), *[completed()] * 3)
    world.sandbox.gate_ended = ko.Ended.TIMEOUT
    assert world.run().record("1.1").status is Status.FAILED
    assert set(world.sandbox.gate_timeouts_s) == {7.0}


# Promise 2: an attempt is counted before it starts.

@pytest.mark.parametrize("end", [Crash(), terminated(), NO_SPACE],
                         ids=["kill -9", "term", "full disk"])
def test_an_attempt_that_crashed_is_charged(end: BaseException) -> None:
    world = World(plan(), end, end, end)
    for _ in range(3):
        with pytest.raises(type(end)):
            world.run()
    state = world.run()
    assert state.record("1.1").reason == "failed 3 times, limit 3"
    assert len(world.agent.calls) == 3


def test_a_persons_ctrl_c_is_not_charged_and_its_work_is_kept() -> None:
    world = World(plan(), failed(), ctrl_c(), ctrl_c(), completed())
    for _ in range(2):
        with pytest.raises(ko.Interrupted):
            world.run()
        assert world.record().started == 1
    assert world.run().record("1.1").started == 2
    assert rejected(world) == {"1.1-1": {"work 1"}, "1.1-1_": {"work 2"},
                               "1.1-1__": {"work 3"}}
    assert world.state().cost_usd == 1.0


@pytest.mark.parametrize("first, then", [
    (session_gone(), ctrl_c()), (terminated(), lost())])
def test_an_interrupted_new_session_does_not_lead_back_to_an_old_one(
    first: Any, then: Any,
) -> None:
    world = World(plan(), asks(), first, then, completed())
    world.run()
    for answer in ("red", ""):
        with contextlib.suppress(ko.Interrupted):
            world.run(answer=answer)
    assert [call.session_id for call in world.agent.calls] == ["", "s-1", "", ""]
    assert world.sandbox.work == {"work 4"}
    assert world.record().status is ko.TaskStatus.COMPLETED


def test_an_answers_session_goes_on_when_a_person_has_logged_in_again() -> None:
    world = World(plan(), asks(), logged_out(), completed())
    world.run()
    world.run(answer="red")
    world.run(answer=ko.CURED)
    assert [call.session_id for call in world.agent.calls] == ["", "s-1", "s-1"]
    assert world.sandbox.work == {"work 1", "work 2", "work 3"}


def test_only_the_session_that_asked_is_told_the_answer() -> None:
    away = dataclasses.replace(overloaded(), session_id="s-2")
    world = World(plan(), asks(), failed(), away, completed())
    world.run()
    world.run(answer="red")
    assert world.agent.calls[-1].session_id == "s-2"
    assert "A person answered your question" not in world.agent.calls[-1].prompt
    again = World(plan(), asks(), failed(), away, asks())
    again.run()
    parked = again.run(answer="red").record("1.1")       # in that session it is new
    assert parked.status is ko.TaskStatus.NEEDS_HUMAN
    cured = World(plan(), logged_out(), overloaded(), completed())
    cured.run()
    cured.run(answer=ko.CURED)
    assert ko.CURED not in cured.agent.calls[-1].prompt


def test_an_answers_session_that_was_interrupted_by_hand_is_gone_on_with() -> None:
    world = World(plan(), asks(), ctrl_c(), lost(), completed())
    world.run()
    with pytest.raises(ko.Interrupted):
        world.run(answer="red")
    world.run()                          # meanwhile the sandbox is lost, and back
    _, *answered = world.agent.calls
    assert [call.session_id for call in answered] == ["s-1"] * 3
    assert all("red" in call.prompt for call in answered)
    assert world.record().status is ko.TaskStatus.COMPLETED


def test_ctrl_c_while_waiting_leaves_the_wait_and_the_count() -> None:
    world = World(plan(), Crash(), overloaded(), completed())
    with pytest.raises(Crash):
        world.run()
    world.clock.crashes = ctrl_c()
    with pytest.raises(ko.Interrupted):
        world.run()
    assert world.record().started == 1 and world.state().wait
    world.clock.crashes = None
    assert world.run().record("1.1").started == 2
    assert world.clock.slept == [30]


def test_a_call_whose_cost_was_not_saved_is_paid_all_the_same() -> None:
    world = World(plan(), completed(), config=ko.Config(max_cost_usd=0.2))
    assert isinstance(world.store, MemoryStore)
    world.store.crash_at = frozenset({4})
    with pytest.raises(Crash):
        world.run()
    assert world.store.saved[-1].cost_usd == 0
    state = world.run()
    assert state.cost_usd == 0.25
    assert state.record("1.1").reason == "money limit: $0.25 spent of $0.20"
    assert len(world.agent.calls) == 1


def test_a_limit_leaves_the_workspace_at_the_checkpoint() -> None:
    world = World(plan(), *[failed()] * 3)
    assert world.run().record("1.1").status is Status.FAILED
    assert world.sandbox.work == frozenset()
    assert rejected(world) == {f"1.1-{n}": {f"work {n}"} for n in (1, 2, 3)}


def test_no_transcript_is_written_over(tmp_path: Path) -> None:
    clock = FakeClock()
    world = World(plan(), ctrl_c(), overloaded(), completed(),
                  store=ko.StateStore(tmp_path, "m", clock))
    world.store.folder.mkdir()
    world.agent.before = lambda call: call.transcript.touch(exist_ok=False)
    with pytest.raises(ko.Interrupted):
        world.run()
    world.run()
    assert [c.transcript.name for c in world.agent.calls] == [
        "1.1-1.ndjson", "1.1-1.1.ndjson", "1.1-1.2.ndjson"]


# Outages.

def test_an_outage_is_waited_out_and_the_session_goes_on_with_its_work() -> None:
    world = World(plan(), overloaded(), overloaded(), completed())
    record = world.run().record("1.1")
    assert (record.started, world.clock.slept) == (1, [30, 60])
    assert [call.session_id for call in world.agent.calls] == ["", "s-1", "s-1"]
    first, *others = (call.prompt.splitlines() for call in world.agent.calls)
    assert all(lines[0] == first[0] and "Go on" in lines[-1] for lines in others)
    assert world.sandbox.commits["c1"] == {"work 1", "work 2", "work 3"}
    assert [e["status"] for e in world.ledger.calls] == ["outage"] * 2 + ["completed"]


def test_a_wait_that_was_killed_is_honoured_by_the_next_start() -> None:
    world = World(plan(), completed())
    reset = world.clock.now().timestamp() + 3600
    world.agent.outcomes.insert(0, limited(reset))
    world.clock.crashes = Crash()
    with pytest.raises(Crash):
        world.run()
    world.clock.crashes = None
    world.clock.sleep(600)
    assert world.run().wait is None
    assert world.clock.now().timestamp() >= reset and len(world.agent.calls) == 2


def test_a_reset_too_far_off_ends_the_run_now() -> None:
    world = World(plan(), completed())
    world.agent.outcomes.insert(0, limited(world.clock.now().timestamp() + 86400))
    with pytest.raises(ko.OutageError, match="usage limit"):
        world.run()
    wait = world.state().wait
    left_s = 86400 + ko.LIMIT_MARGIN_S
    assert wait and ko.seconds_to(wait.until, world.clock.now()) == left_s
    assert (len(world.agent.calls), world.record().started) == (1, 0)
    world.clock.sleep(left_s)
    assert world.run().record("1.1").status is Status.COMPLETED


@pytest.mark.parametrize("away", [
    overloaded(), api_error("usage limit reached", api_error_status=429)])
def test_the_limit_on_waits_is_for_resets_alone(away: ko.AgentResult) -> None:
    world = World(plan(), away, completed(), config=ko.Config(limit_wait_s=9))
    world.run()
    assert world.clock.slept == [30]


def test_an_answer_ends_a_row_of_outages() -> None:
    world = World(plan(), overloaded(), failed(), overloaded(), completed(),
                  config=ko.Config(outage_delays_s=(5.0,)))
    assert world.run().record("1.1").started == 2
    assert world.clock.slept == [5, 5]


def test_an_outage_that_outlasts_the_delays_ends_the_run_uncharged(
    tmp_path: Path,
) -> None:
    world = World(plan(), overloaded(), completed(),
                  config=ko.Config(outage_delays_s=()),
                  store=ko.StateStore(tmp_path, "m", FakeClock()))
    with pytest.raises(ko.OutageError):
        world.run()
    assert world.record().started == 0 and world.state().wait
    assert world.run().record("1.1").status is Status.COMPLETED


@pytest.mark.parametrize("policy", ["park", "recommend"])
def test_what_no_waiting_cures_is_asked_of_a_person_once_and_not_charged(
    policy: str,
) -> None:
    world = World(plan(), logged_out(), completed(),
                  config=ko.Config(on_question=policy))
    for _ in range(3):
        assert ko.exit_code(world.plan, world.run()) is ko.ExitCode.NEEDS_HUMAN
    assert (len(world.agent.calls), world.record().started) == (1, 0)
    question = world.record().question
    assert question and "/login" in question.text
    assert world.run(answer=question.options[0]).record(
        "1.1").status is Status.COMPLETED
    assert world.agent.calls[1].session_id == ""


def test_with_nobody_there_the_recommendation_may_be_taken() -> None:
    world = World(plan(), asks(), completed(),
                  config=ko.Config(on_question="recommend"))
    assert world.run().record("1.1").status is Status.COMPLETED
    assert "blue" in world.agent.calls[1].prompt
    assert "as recommended: blue" in world.told.getvalue()
    silent = World(plan(), reported(status="needs_human", question="Which?"),
                   config=ko.Config(on_question="recommend"))
    assert silent.run().record("1.1").status is Status.NEEDS_HUMAN


def test_a_question_that_comes_again_after_its_answer_is_a_loop() -> None:
    world = World(plan(), asks("Which port, 8080 or 9090?"),
                  asks("Which port, 8081 or 9090?"), completed(),
                  terminal=FakeTerminal("a", "a", "a"))
    record = world.run().record("1.1")
    assert record.status is Status.FAILED and "asks again" in record.reason
    assert len(world.terminal.prompts) == 1


# Questions.

def test_a_parked_question_is_answered_in_the_same_session_with_its_work() -> None:
    world = World(plan(), asks(), completed())
    assert ko.exit_code(world.plan, world.run()) is ko.ExitCode.NEEDS_HUMAN
    assert ko.exit_code(world.plan, world.run()) is ko.ExitCode.NEEDS_HUMAN
    world.run(answer="red")
    first, second = world.agent.calls
    assert (first.session_id, second.session_id) == ("", "s-1")
    assert "red" in second.prompt
    assert world.sandbox.commits["c1"] == {"work 1", "work 2"}


def test_a_session_that_is_gone_gives_way_to_a_new_one_told_the_answer() -> None:
    world = World(plan(), asks(), session_gone(), completed())
    world.run()
    record = world.run(answer="red").record("1.1")
    assert world.agent.calls[2].session_id == ""
    assert "Answer: red" in world.agent.calls[2].prompt
    assert (record.status, record.started) == (Status.COMPLETED, 2)
    assert world.sandbox.commits["c1"] == {"work 3"}


def test_an_outage_after_the_answer_goes_on_in_the_same_session() -> None:
    world = World(plan(), asks(), overloaded(), completed())
    world.run()
    world.run(answer="red")
    assert [c.session_id for c in world.agent.calls] == ["", "s-1", "s-1"]
    assert world.sandbox.commits["c1"] == {"work 1", "work 2", "work 3"}


def test_a_crash_after_the_answer_starts_anew_with_the_answer() -> None:
    world = World(plan(), asks(), Crash(), completed())
    world.run()
    with pytest.raises(Crash):
        world.run(answer="red")
    world.run()
    assert world.agent.calls[2].session_id == ""
    assert "Answer: red" in world.agent.calls[2].prompt


def test_a_reset_of_the_sandbox_takes_no_answer_to_work_that_is_gone() -> None:
    world = World(plan(task("1.1"), task("1.2")), completed(), asks(), completed())
    world.run()
    world.sandbox.reset()
    world.run(answer="red")
    assert world.agent.calls[2].session_id == ""
    assert world.sandbox.work == {"work 1", "work 3"}


@pytest.mark.parametrize(("end", "work"), [
    (overloaded(), {"work 2", "work 3"}), (ctrl_c(), {"work 3"})],
    ids=["outage", "ctrl-c"])
def test_work_that_a_reset_took_is_not_found_again_in_a_later_attempt(
    end: Outcome, work: set[str],
) -> None:
    world = World(plan(task(gates=("check",))), completed(), end, completed())
    assert isinstance(world.store, MemoryStore)
    world.store.crash_at = frozenset({5})
    with pytest.raises(Crash):
        world.run()
    world.sandbox.dirty.clear()
    world.sandbox.reset()
    world.sandbox.calls.clear()
    with contextlib.suppress(ko.Interrupted):
        world.run()
    world.run()
    assert world.sandbox.calls.count("gate check") == 1
    assert world.sandbox.work == work


def test_another_task_in_between_takes_no_answer_to_work_that_is_gone() -> None:
    one, two = task("1.1"), task("1.2")
    for other in (completed(), failed()):
        world = World(plan(one, two), asks(), other, completed(), completed(),
                      config=ko.Config(max_attempts=1))
        world.run()
        world.run_one(two)
        before = world.sandbox.work
        world.run(answer="red")
        assert world.agent.calls[2].session_id == ""
        assert world.sandbox.commits[world.record("1.1").checkpoint] == {
            *before, "work 3"}


def test_the_question_above_the_limit_is_not_put_to_anybody() -> None:
    texts = ("Which colour?", "Who pays for it?", "Shall old files be removed now?",
             "What is the port of the service?", "Where do logs go?", "Why not both?")
    world = World(plan(), *map(asks, texts), terminal=FakeTerminal(*["a"] * 9))
    record = world.run().record("1.1")
    limit = ko.MAX_QUESTIONS
    assert record.reason == f"asked {limit} questions, limit {limit}"
    assert len(world.terminal.prompts) == limit - 1


def test_without_money_a_parked_question_is_still_asked() -> None:
    world = World(plan(), asks(), config=ko.Config(max_cost_usd=0.1))
    assert world.run().record("1.1").status is Status.NEEDS_HUMAN


@pytest.mark.parametrize(("line", "answer"), [
    ("a", "red"), ("B)", "blue"), ("2", "blue"), ("", "blue"), ("skip", "blue"),
    ("no", "no"), ("c", "c"), ("ba", "ba"), ("3", "3"), ("0", "0"), ("Red, please",
                                                                    "Red, please")])
def test_an_answer_is_a_letter_a_number_skip_or_words(line: str, answer: str) -> None:
    question = ko.Question("Which?", ("red", "blue"), "blue")
    assert ko.chosen_answer(line, question) == answer


# A plan that was edited, tasks out of turn.

def test_an_edited_task_starts_anew_and_a_completed_one_stays() -> None:
    one, two = task("1.1"), task("1.2")
    world = World(plan(one, two), completed(), *[failed()] * 3, completed())
    world.run()
    edited = [ko.Task(t.id, t.title, 1, 2, f"{t.text} edited") for t in (one, two)]
    world.plan = plan(*edited)
    told = ko.with_plan_changes(world.store.load() or pytest.fail(), world.plan)[1]
    assert [text.split(" ")[1:4] for text in told[1:]] == [
        ["1.1", "is", "completed,"], ["1.2", "was", "edited;"]]
    state = world.run()
    assert [state.record(i).started for i in ("1.1", "1.2")] == [1, 1]
    assert len(world.agent.calls) == 5


def test_a_question_of_a_task_that_left_the_plan_waits_for_nobody() -> None:
    world = World(plan(task("1.1")), asks(), completed())
    world.run()
    world.plan = plan(task("1.2"))
    assert waiting(world.state()) == []
    assert ko.exit_code(world.plan, world.run()) is ko.ExitCode.OK


def test_a_failed_task_that_is_tried_again_keeps_what_was_completed_since() -> None:
    one, two = task("1.1"), task("1.2")
    world = World(plan(one, two), failed(), completed(), completed(),
                  config=ko.Config(max_attempts=1))
    world.run()
    world.run_one(two)
    world.config = ko.Config(max_attempts=2)
    world.run()
    assert world.sandbox.work == {"work 2", "work 3"}


# Anything, in any order, with the program killed at any save.

LIMIT, MONEY_USD = 2, 3.0
OUTCOMES: dict[str, Outcome] = {
    "completed": completed(), "failed": failed(), "asks": asks(), "crash": Crash(),
    "outage": overloaded(), "logged out": logged_out(), "full disk": NO_SPACE,
    "session gone": session_gone(), "ctrl-c": ctrl_c(), "term": terminated(),
    "limit": limited(FakeClock().now().timestamp() + 7200),
    "silent": ko.AgentResult(ended=ko.Ended.IDLE),
    "too long": api_error("Prompt is too long"),
}
UNCHARGED = ("outage", "logged out", "ctrl-c", "limit", "too long", "asks")


class Witness:
    """Watches each call and each save of a world, and holds them to the promises."""

    def __init__(self, names: list[str], crashes: Any, gate: list[int],
                 resets: frozenset[int]) -> None:
        self.world = world = World(
            plan(task("1.1", gates=("gate",)), task("1.2")),
            config=ko.Config(max_attempts=LIMIT, max_cost_usd=MONEY_USD,
                             outage_delays_s=(1.0,)),
            sandbox=FakeSandbox(gate=gate))
        world.agent.outcomes = [OUTCOMES[name] for name in names]
        world.agent.before = self._before
        assert isinstance(world.store, MemoryStore)
        self.store = world.store
        self.store.crash_at, self.store.crash_after = crashes
        self._names, self._resets = names, resets
        self.work: dict[tuple[str, int], str] = {}
        self.charged: Counter[str] = Counter()

    def _before(self, call: ko.Call) -> None:
        name, saved = self._names[len(self.world.agent.calls)], self.store.saved[-1]
        running = [i for i, r in saved.tasks.items() if r.status is Status.RUNNING]
        assert len(running) == 1
        record = saved.record(running[0])
        number = len(self.world.agent.calls) + 1
        self.work[running[0], record.started] = f"work {number}"
        assert record.started not in [0, *(a.number for a in record.attempts)]
        assert sum(e["cost_usd"] for e in self.world.ledger.calls) < MONEY_USD
        if not call.session_id:
            assert self.world.sandbox.head == saved.head
            assert not self.world.sandbox.dirty
            self.charged[running[0]] += name not in UNCHARGED
        else:
            self.charged[running[0]] += name not in (*UNCHARGED, "session gone")

    def starts_until_nothing_is_left(self) -> None:
        for start in range(60):
            if start in self._resets and self.store.saved:
                self.world.sandbox.reset()
            try:
                state = self.world.run(answer="a")
            except (Crash, ko.OrchestratorError):
                continue
            except IndexError:           # the outcomes are used up
                break
            if ko.exit_code(self.world.plan, state) is not ko.ExitCode.NEEDS_HUMAN:
                break

    def judges(self) -> None:
        assert all(count <= LIMIT for count in self.charged.values())
        sandbox, done = self.world.sandbox, dict[str, ko.TaskRecord]()
        saved = self.store.saved
        for before, state in zip([None, *saved], saved, strict=False):
            for task_id, record in state.tasks.items():
                if task_id in done:
                    assert record == done[task_id]
                elif record.status is Status.COMPLETED:
                    assert before and before.record(task_id).attempts == record.attempts
                    assert record.attempts[-1].status == "completed"
                    assert self.work[task_id, record.started] in sandbox.commits[
                        record.checkpoint]
                    done[task_id] = record
                asked = [a.status for a in record.attempts].count("needs_human")
                assert asked <= ko.MAX_QUESTIONS
                assert record.started - asked <= LIMIT
        log = sandbox.log(saved[-1].head if saved else "")
        assert sorted(log) == [f"Task {i}: Title {i}" for i in sorted(done)]
        if self._resets:
            return
        assert sandbox.work >= frozenset().union(
            *(sandbox.commits[r.checkpoint] for r in done.values()))
        kept = frozenset().union(sandbox.work, *sandbox.refs.values())
        assert len(kept) == len(self.world.agent.calls)


SAVES = st.frozensets(st.integers(1, 40), max_size=5)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=14),
       crashes=st.tuples(SAVES, SAVES), gate=st.lists(st.integers(0, 1), max_size=3),
       resets=st.frozensets(st.integers(1, 6), max_size=2))
def test_nothing_exceeds_a_limit_loses_work_or_is_recorded_twice(
    names: list[str], crashes: Any, gate: list[int], resets: frozenset[int],
) -> None:
    witness = Witness(names, crashes, gate, resets)
    witness.starts_until_nothing_is_left()
    witness.judges()
