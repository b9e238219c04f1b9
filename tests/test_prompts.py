"""Section 5: what the agent is told."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ktrdr_orchestrator as ko

TASK = ko.Task("1.2", "Add the command", 10, 20,
               "## Task 1.2: Add the command\n\nDo it.",
               gates=("python3 -m health",))
PLAN = ko.Plan(Path("m1.md"), "m1", "Health", "ab", tasks=(TASK,),
               context="Why we do it.")
RECORD = ko.TaskRecord(started=2, attempts=(
    ko.Attempt(1, "", 1, "exit", "failed", "gate", "E-4711 broke", "s", 1, 0.1),))


def prompt(record: ko.TaskRecord = RECORD, guidance: str = "",
           is_resumed: bool = False) -> str:
    return ko.task_prompt(PLAN, TASK, record, max_attempts=3, guidance=guidance,
                          is_resumed=is_resumed)


def test_the_first_line_names_task_milestone_and_attempt() -> None:
    assert prompt().splitlines()[0] == \
        "Task 1.2 of milestone m1: Add the command (attempt 2 of 3)"


def test_the_task_stands_in_it_as_written_with_its_gates_and_the_context() -> None:
    for part in (TASK.text, "python3 -m health", "Why we do it."):
        assert part in prompt()


def test_a_retry_is_told_what_failed_before() -> None:
    assert "E-4711 broke" in prompt()
    assert "attempts failed" not in prompt(ko.TaskRecord(started=1))


def test_guidance_and_an_earlier_answer_are_passed_on() -> None:
    record = dataclasses.replace(RECORD, question=ko.Question("Which?"),
                                 answer="SQLite")
    text = prompt(record, guidance="Mind the tests.")
    assert "Which?" in text and "SQLite" in text and "Mind the tests." in text


def test_the_answer_and_the_scenario_name_their_milestone_in_the_first_line() -> None:
    (*_, last) = RECORD.attempts
    record = dataclasses.replace(RECORD, answer="SQLite", session_id=last.session_id)
    answer = prompt(record, is_resumed=True)
    assert answer.startswith("Answer: Task 1.2 of milestone m1: Add the command")
    assert "SQLite" in answer
    scenario = ko.Task(ko.E2E_ID, "E2E Test", 1, 2, "## E2E Test\n\nRun it.")
    assert ko.e2e_prompt(PLAN, scenario, 1, "").startswith(
        "E2E scenario of milestone m1 (run 1)")
    assert "Run it." in ko.e2e_prompt(PLAN, scenario, 1, "")


def test_the_schemas_are_json_and_know_every_status() -> None:
    verdict = json.loads(json.dumps(ko.VERDICT_SCHEMA))["properties"]
    assert verdict["status"]["enum"] == [s.value for s in ko.VerdictStatus]
    scenario = json.loads(json.dumps(ko.E2E_SCHEMA))["properties"]
    assert scenario["status"]["enum"] == ["passed", "failed", "unclear"]


def test_a_long_text_loses_its_middle_only() -> None:
    text = ko.shortened("a" * 400 + "b" * 400, 100)
    assert len(text) <= 100 and text.startswith("aaa") and text.endswith("bbb")
    assert ko.shortened(" short ") == "short"


def test_the_agent_is_told_what_deserves_a_person_and_what_to_decide_itself() -> None:
    told = " ".join(prompt().split())
    for part in ("Decide details", "say what you chose", "a product decision, a secret",
                 "cannot be undone", "An offer after finished work is no question"):
        assert part in told
