"""Left alone: second opinions, answers on record, waits that show, circles that end."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    FakeClock,
    FakeTerminal,
    MemoryLedger,
    MemoryStore,
    World,
    api_error,
    asks,
    completed,
    failed,
    limited,
    new_state,
    overloaded,
    plan,
    reported,
    session_gone,
)

import ktrdr_orchestrator as ko

Status = ko.TaskStatus


def prose(text: str) -> ko.AgentResult:
    """A call that ended in words only."""
    return ko.AgentResult(
        ended=ko.Ended.EXIT,
        exit_code=0,
        has_result=True,
        subtype="success",
        terminal_reason="completed",
        session_id="s-1",
        turns=3,
        events=9,
        text=text,
        usage=ko.Usage(10, 20, 0, 0, 0.25),
    )


# A cheap model that reads what is unclear.


def test_prose_is_read_by_the_interpreter_and_its_cost_is_counted() -> None:
    world = World(
        plan(),
        prose("Shall I go on?"),
        completed(),
        config=ko.Config(interpreter="haiku"),
    )
    state = world.run()
    assert state.record("1.1").attempts[0].rule == "interpreter"
    assert state.record("1.1").status is Status.COMPLETED
    reader = world.agent.calls[1]
    assert (reader.model, reader.is_reader) == ("haiku", True)
    assert "Shall I go on?" in reader.prompt and state.cost_usd == 0.5
    assert [(e.get("kind"), e["cost_usd"]) for e in world.ledger.calls] == [
        (None, 0.25),
        ("interpreter", 0.25),
    ]


def test_the_interpreter_may_find_a_question_in_what_looked_done() -> None:
    world = World(
        plan(),
        prose("I added the tests."),
        asks("Red or blue?"),
        config=ko.Config(interpreter="haiku"),
    )
    record = world.run().record("1.1")
    assert record.status is Status.NEEDS_HUMAN
    assert record.question and record.question.text == "Red or blue?"


@pytest.mark.parametrize("answer", [prose("hm"), overloaded(), failed("x")])
def test_an_interpreter_without_a_report_changes_nothing(
    answer: ko.AgentResult,
) -> None:
    world = World(
        plan(),
        prose("I added the tests."),
        answer,
        completed(),
        config=ko.Config(interpreter="haiku"),
    )
    rule = world.run().record("1.1").attempts[0].rule
    assert rule == ("interpreter" if answer.structured else "text_done")


@pytest.mark.parametrize("config", [ko.Config(), ko.Config(interpreter="haiku")])
def test_a_report_is_never_read_a_second_time(config: ko.Config) -> None:
    world = World(plan(), completed(), config=config)
    world.run()
    assert len(world.agent.calls) == 1


# Answers.


def test_the_ledger_tells_what_was_asked_answered_and_how_long_it_took() -> None:
    world = World(
        plan(), asks("Which colour?"), completed(), terminal=FakeTerminal("b\n")
    )
    world.run()
    line = next(e for e in world.ledger.lines if e.get("kind") == "answer")
    assert (line["question"], line["answer"]) == ("Which colour?", "blue")
    assert (line["milestone"], line["task"], line["waited_s"]) == ("m", "1.1", 0.0)


def test_an_answer_hours_later_counts_the_hours() -> None:
    clock, ledger = FakeClock(), MemoryLedger()
    store = MemoryStore(clock)
    store.ledger = ledger
    state = replace(new_state(plan(), clock), updated_at=ko.stamp(clock.now()))
    clock.sleep(7200)
    after = ko.answered(state, "1.1", "use SQLite", store)
    assert after.record("1.1").answer == "use SQLite" and store.saved == [after]
    assert ledger.lines[0]["waited_s"] == 7200


# Circles.


def idle(number: int, evidence: str = "no such module: foo") -> ko.Attempt:
    return ko.Attempt(
        number,
        "",
        1.0,
        "exit",
        "failed",
        "structured",
        evidence,
        "",
        1,
        0.1,
        is_idle=True,
    )


def test_two_attempts_that_changed_nothing_and_failed_alike_are_enough() -> None:
    record = ko.TaskRecord(started=2, attempts=(idle(1), idle(2)))
    assert ko.detect_loop(record, ko.Config()) == (
        "failed twice, errors 100% alike, and changed nothing"
    )
    other = ko.TaskRecord(started=2, attempts=(idle(1), idle(2, "the disk is full")))
    assert ko.detect_loop(other, ko.Config()) == ""


def test_an_attempt_that_left_the_workspace_as_it_was_is_noted() -> None:
    world = World(plan(), failed(), failed(), failed())
    world.agent.leaves_work = False
    record = world.run().record("1.1")
    assert record.started == 2 and all(a.is_idle for a in record.attempts)
    assert record.reason == "failed twice, errors 100% alike, and changed nothing"


def test_attempts_that_changed_something_have_all_their_tries() -> None:
    world = World(plan(), *[failed()] * 3)
    record = world.run().record("1.1")
    assert record.started == 3 and not any(a.is_idle for a in record.attempts)


def line(**event: Any) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def call(
    number: int, command: str = "make", told: str = "no rule", *, fails: bool = True
) -> bytes:
    """A tool call and its end."""
    return line(
        type="assistant",
        message={
            "content": [
                {
                    "type": "tool_use",
                    "id": f"t{number}",
                    "name": "Bash",
                    "input": {"command": command},
                }
            ]
        },
    ) + line(
        type="user",
        message={
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": f"t{number}",
                    "content": told,
                    "is_error": fails,
                }
            ]
        },
    )


def folded(*parts: bytes, limit: int = 3) -> ko.AgentResult:
    decoder = ko.StreamDecoder(max_repeats=limit)
    for part in parts:
        decoder.feed(part)
    return decoder.finish()


def test_a_tool_call_that_fails_alike_again_and_again_is_a_loop() -> None:
    result = folded(call(1), call(2), call(3))
    assert result.repeated == "failed 3 times alike: Bash make"
    verdict = ko.judge(result)
    assert (verdict.status, verdict.rule) == (ko.VerdictStatus.FAILED, "tool_loop")


@pytest.mark.parametrize(
    "calls",
    [
        [call(1), call(2)],
        [call(n, fails=False) for n in range(9)],
        [call(n, f"make {n}") for n in range(9)],
        [call(n, told=f"{n} errors") for n in range(9)],
        [
            line(
                type="user",
                message={
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "x",
                            "content": "?",
                            "is_error": True,
                        }
                    ]
                },
            )
        ]
        * 9,
    ],
)
def test_what_differs_or_succeeds_is_no_loop(calls: list[bytes]) -> None:
    assert folded(*calls).repeated == ""


def test_no_limit_means_any_number() -> None:
    assert folded(*[call(n) for n in range(99)], limit=0).repeated == ""


def test_a_report_after_the_loop_still_counts() -> None:
    done = line(
        type="result",
        subtype="success",
        is_error=False,
        result="ok",
        structured_output={"status": "completed", "summary": "after all"},
    )
    result = folded(call(1), call(2), call(3), done)
    assert ko.judge(result).status is ko.VerdictStatus.COMPLETED


# Waits.


def test_a_session_that_is_gone_after_an_outage_is_replaced_by_a_new_one() -> None:
    world = World(plan(), overloaded(), session_gone(), completed())
    record = world.run().record("1.1")
    assert [c.session_id for c in world.agent.calls] == ["", "s-1", ""]
    assert (record.status, record.started) == (Status.COMPLETED, 1)
    assert world.sandbox.work == {"work 3"}


def test_a_task_whose_prompt_was_too_long_is_not_gone_on_with() -> None:
    world = World(
        plan(), api_error("Prompt is too long", api_error_status=400), completed()
    )
    world.run()
    world.run(answer=ko.CURED)
    assert [c.session_id for c in world.agent.calls] == ["", ""]


class LiveStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_wait_counts_down_on_a_terminal_and_is_one_line_in_a_log() -> None:
    clock, err = FakeClock(), LiveStream()
    live = ko.Reporter(io.StringIO(), err, clock, term="xterm")
    assert live.countdown(90.5) == 1.0 and "going on in 1:30" in err.getvalue()
    plain = ko.Reporter(io.StringIO(), log := io.StringIO(), clock)
    assert plain.countdown(90.5) == 60.0 and log.getvalue() == ""
    assert plain.countdown(5.0) == 5.0


def test_a_long_wait_is_told_once_and_ends_in_time() -> None:
    world = World(plan(), completed())
    reset = world.clock.now().timestamp() + 3600
    world.agent.outcomes.insert(0, limited(reset))
    world.run()
    assert world.notifier.news == ["waiting", "resumed"]
    assert 0 <= world.clock.now().timestamp() - reset - ko.LIMIT_MARGIN_S < 1


def test_the_cli_waits_in_its_session_only_as_long_as_no_deadline_is_near() -> None:
    name = "CLAUDE_CODE_RETRY_WATCHDOG"
    assert ko.retry_variables(ko.Config(), {}) == {
        name: "1",
        f"{name}_MAX_USAGE_LIMIT_WAIT_MS": "450000",
        f"{name}_MAX_WAIT_MS": "120000",
    }
    short = ko.retry_variables(ko.Config(limit_wait_s=30), {})
    assert {*short.values()} == {"1", "30000"}
    assert ko.retry_variables(ko.Config(), {"CLAUDE_CODE_MAX_RETRIES": "0"}) == {}


# The log file.


def test_progress_and_errors_are_appended_to_the_log_file_as_well(
    tmp_path: Path,
) -> None:
    log = tmp_path / "night.log"
    reporter = ko.Reporter(
        io.StringIO(), LiveStream(), FakeClock(), term="xterm"
    )
    reporter.log_file = str(log)
    reporter.progress("one")
    reporter.progress("a live line", is_live=True)
    log.rename(tmp_path / "night.log.1")  # as logrotate does
    reporter.error(ko.UsageError("two", hint="three"))
    assert (tmp_path / "night.log.1").read_text().endswith(" one\n")
    assert "two" in log.read_text() and "live" not in log.read_text()


def test_a_log_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    err = io.StringIO()
    reporter = ko.Reporter(io.StringIO(), err, FakeClock())
    reporter.log_file = str(tmp_path)
    reporter.progress("still here")
    assert "still here" in err.getvalue()


def test_a_reported_result_needs_no_guess() -> None:
    assert ko.judge(reported(status="completed", summary="x")).rule == "structured"
