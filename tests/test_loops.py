"""Section 8: when to stop trying, how long to wait."""
from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ktrdr_orchestrator as ko


def attempt(number: int, status: str = "failed", evidence: str = "boom") -> ko.Attempt:
    return ko.Attempt(number, "", 1.0, "exit", status, "r", evidence, "s", 1, 0.0)


def record(*statuses: str, started: int | None = None, evidence: str = "boom",
           ) -> ko.TaskRecord:
    attempts = tuple(attempt(n, status, evidence)
                     for n, status in enumerate(statuses, start=1))
    return ko.TaskRecord(started=len(attempts) if started is None else started,
                         attempts=attempts)


def reason(of: ko.TaskRecord) -> str:
    return ko.detect_loop(of, ko.Config())


@pytest.mark.parametrize("statuses", [(), ("failed",), ("failed", "failed"),
                                      ("needs_human", "failed", "failed")])
def test_below_the_limit_it_goes_on(statuses: tuple[str, ...]) -> None:
    assert reason(record(*statuses)) == ""


def test_at_the_limit_it_says_how_often_and_how_alike() -> None:
    assert reason(record(*["failed"] * 3)) == \
        "failed 3 times, limit 3, errors 100% alike"


def test_an_attempt_that_crashed_is_charged() -> None:
    assert "limit 3" in reason(record("failed", started=3))


def test_a_question_is_not_charged_but_endless_questions_are_stopped() -> None:
    assert reason(record(*["needs_human"] * 4)) == ""
    assert "questions" in reason(record(*["needs_human"] * ko.MAX_QUESTIONS))


@pytest.mark.parametrize(("a", "b", "alike"), [
    ("at /tmp/x1/a.py line 3: KeyError 'id'",
     "at /srv/y/a.py line 99: KeyError 'id'", True),
    ("took 1.25 s, exit 1, commit 0a1b2c3d",
     "took 9.5 s, exit 2, commit ffeedd00", True),
    ("AssertionError: total is wrong",
     "ModuleNotFoundError: no module named health", False),
    ("", "", True)])
def test_errors_are_alike_but_for_what_changes_from_run_to_run(
    a: str, b: str, alike: bool,
) -> None:
    assert (ko.similarity(a, b) >= 0.8) == alike


@given(st.text(max_size=200), st.text(max_size=200))
def test_similarity_is_a_ratio_and_of_a_text_with_itself_one(a: str, b: str) -> None:
    assert 0 <= ko.similarity(a, b) <= 1
    assert ko.similarity(a, a) == 1


@pytest.mark.parametrize("text", ["a" * 1_000_000, "/" * 1_000_000, "0x" * 500_000,
                                  "a/" * 500_000, "1." * 500_000, "word " * 200_000])
def test_a_huge_error_costs_little(text: str) -> None:
    begun = time.process_time()
    ko.similarity(text, text[1:])
    assert time.process_time() - begun < 0.5


def test_outages_are_retried_after_each_delay_then_given_up() -> None:
    outage = ko.Outage(ko.OutageKind.RETRY, "overloaded")
    config = ko.Config(outage_delays_s=(30, 60, 120), limit_wait_s=9)
    waits = [ko.retry_delay_s(outage, n, 0, config) for n in range(1, 5)]
    assert waits == [30, 60, 120, float("inf")]


@pytest.mark.parametrize(("resets_at", "wait_s"), [
    (1000.0, 60), (1100.0, 160), (900.0, 60), (99_999.0, 99_059)])
def test_a_usage_limit_is_waited_for_until_its_reset_and_a_margin(
    resets_at: float, wait_s: float,
) -> None:
    limit = ko.Outage(ko.OutageKind.LIMIT, "limit", resets_at)
    assert ko.retry_delay_s(limit, 1, 1000, ko.Config(limit_wait_s=3600)) == wait_s


def test_a_limit_without_a_reset_time_is_retried_like_an_outage() -> None:
    limit = ko.Outage(ko.OutageKind.LIMIT, "limit")
    assert ko.retry_delay_s(limit, 1, 0, ko.Config(limit_wait_s=9)) == 30
