"""Section 13: metrics are a function of the ledger, whatever happened to the runs."""
from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TEST_PLANS
from fakes import (
    Crash,
    FakeSandbox,
    FakeTerminal,
    World,
    asks,
    completed,
    failed,
    logged_out,
    overloaded,
    plan,
    reported,
    scenario,
    session_gone,
    task,
    totals_of,
)
from program import LOCAL, Program
from receiver import OtlpReceiver

import ktrdr_orchestrator as ko

HELLO, E2E = TEST_PLANS / "hello_world.md", TEST_PLANS / "e2e_will_pass.md"


def line(n: int = 0, **fields: Any) -> dict[str, Any]:
    """An agent's call as the ledger has it, the n-th of milestone m."""
    return {"at": f"2030-01-01T00:00:{n:02}+00:00", "milestone": "m", "run": "r",
            "task": "1.1", "attempt": 1, "status": "completed", "duration_s": 60.0,
            "cost_usd": 0.25, "tokens": {"input": 10, "output": 20}, **fields}


def prose(text: str) -> ko.AgentResult:
    """A call that ended in words only."""
    return dataclasses.replace(completed(), structured=None, text=text)


def total(lines: Sequence[Mapping[str, Any]], name: str, value: str = "",
          milestone: str = "m") -> float:
    return sum(totals_of(lines, "m")[name, milestone, value].values())


def of(world: World, name: str, value: str = "") -> float:
    """Of a ledger that a crew of fakes wrote."""
    return total(world.ledger.lines, name, value)


# What counts as what.

def test_a_milestone_has_every_series_before_it_did_anything() -> None:
    found = totals_of([], "m")
    assert {(name, value) for name, _, value in found} == {
        (name, value) for name, (*_, values) in ko.METRICS.items() for value in values}
    assert not any(any(numbers.values()) for numbers in found.values())


def test_the_names_are_those_of_the_design() -> None:
    assert {
        "tasks_total": "status", "tokens_total": "kind", "cost_usd_total": "",
        "escalations_total": "", "loops_detected_total": "type",
        "e2e_tests_total": "status", "e2e_fix_attempts_total": "success",
        "task_duration_seconds": "status",
    }.items() <= {name: label for name, (_, label, _) in ko.METRICS.items()}.items()


def test_money_and_tokens_are_those_of_all_calls_whatever_they_came_to() -> None:
    lines = [line(n, status=status) for n, status in enumerate(
        ("completed", "failed", "needs_human", "outage", "interrupted"))]
    assert total(lines, "cost_usd_total") == 1.25
    assert total(lines, "tokens_total", "output") == 100
    assert [total(lines, "tasks_total", s) for s in ko.VerdictStatus] == [1, 1, 1]
    assert total(lines, "task_duration_seconds", "failed") == 60


def test_an_attempt_counts_once_its_gates_have_spoken() -> None:
    said = line(is_open=True)
    assert total([said], "tasks_total", "completed") == 0
    for word in ("completed", "failed"):
        judged = line(status=word, kind="gate", cost_usd=0.0, tokens={})
        assert total([said, judged], "tasks_total", word) == 1
        assert total([said, judged], "task_duration_seconds", word) == 60
        assert sum(total([said, judged], "tasks_total", s)
                   for s in ko.VerdictStatus) == 1


def test_a_line_that_a_crash_had_written_again_counts_once() -> None:
    again = [line(kind="gate", status="failed"), line(kind="gate", status="failed")]
    assert total(again, "tasks_total", "failed") == 1


def test_the_scenario_and_its_fixes_are_no_tasks() -> None:
    lines = [line(1, task="e2e", status="failed"), line(2, task="e2e-fix-1"),
             line(3, task="e2e", status="needs_human"),
             line(4, task="e2e-fix-2", status="failed"), line(5, task="e2e"),
             line(6, task="e2e", kind="gate", cost_usd=0.0)]     # of gates alone
    assert [total(lines, "e2e_tests_total", s) for s in ko.VerdictStatus] == [2, 1, 1]
    assert [total(lines, "e2e_fix_attempts_total", word)
            for word in ("true", "false")] == [1, 1]
    assert not any(total(lines, name, s) for s in ko.VerdictStatus
                   for name in ("tasks_total", "task_duration_seconds"))
    assert total(lines, "cost_usd_total") == 1.25


def test_milestones_of_one_ledger_are_kept_apart() -> None:
    lines = [line(1), line(2, milestone="other", cost_usd=0.5)]
    assert total(lines, "cost_usd_total") == 0.25
    assert total(lines, "cost_usd_total", milestone="other") == 0.5
    assert total(lines, "tasks_total", "failed", milestone="other") == 0


def test_totals_only_ever_grow_with_the_ledger() -> None:
    lines = [line(1, is_open=True), line(1, kind="gate", status="failed"),
             line(2, status="outage"), line(3, kind="sandbox_reset"),
             line(4, status="needs_human"), line(5, kind="escalation"),
             line(6, kind="answer", advice="followed"), line(7, task="e2e")]
    states = [totals_of(lines[:n], "m") for n in range(len(lines) + 1)]
    for before, after in itertools.pairwise(states):
        for key in (key for key in before if key[0] != "waiting"):
            assert before[key].items() <= after[key].items()


def test_a_question_waits_and_counts_until_it_is_answered_or_gone() -> None:
    asked = [line(n, kind="escalation", task=f"1.{n}") for n in (1, 2)]
    again = [line(n + 2, kind="escalation", task=f"1.{n}") for n in (1, 2)]
    assert total([*asked, *again], "escalations_total") == 2
    assert total([*asked, *again], "waiting", "person") == 2
    answer = line(5, kind="answer")
    assert total([*asked, answer], "waiting", "person") == 1
    assert total([*asked, answer, again[0]], "escalations_total") == 3
    other = line(6, task="1.3")          # done meanwhile
    assert total([*asked, answer, other], "waiting", "person") == 1
    fresh = line(7, kind="sandbox_reset", task=None, run="another")
    assert total([*asked, fresh], "waiting", "person") == 0


def test_an_answer_counts_by_what_the_agent_had_advised() -> None:
    for answer, advice in (("blue", "followed"), ("red", "none or not followed")):
        world = World(plan(), asks(), completed(), terminal=FakeTerminal(answer))
        world.run()
        assert of(world, "answers_total", advice) == 1
        assert sum(of(world, "answers_total", a) for a in (
            "followed", "none or not followed")) == 1


@pytest.mark.parametrize("odd", [
    {}, {"milestone": 3, "models": 7}, {"milestone": "m", "tokens": 1, "task": 2,
    "cost_usd": "x", "status": []}, {"milestone": "m", "duration_s": -1}])
def test_a_strange_line_does_no_harm(odd: dict[str, Any]) -> None:
    assert total([odd, line(1)], "cost_usd_total") == 0.25


# What the runners write is what is counted.

def test_attempts_gates_and_what_they_cost_are_counted_as_they_happened() -> None:
    world = World(plan(task(gates=("check",)), task("1.2")), failed(), completed(),
                  completed(), completed(), sandbox=FakeSandbox(check=[1, 0]))
    world.run()
    assert [of(world, "tasks_total", s) for s in ("completed", "failed")] == [2, 2]
    assert of(world, "cost_usd_total") == world.state().cost_usd == 1.0
    assert of(world, "task_duration_seconds", "completed") == 120
    assert len(totals_of(world.ledger.lines, "m")[
        "sandbox_reset_seconds", "m", ""]) == 1


def test_an_interpreter_has_the_last_word_on_an_attempt() -> None:
    config = ko.Config(interpreter="haiku")
    for read, word in ((failed(), "failed"), (completed(), "completed")):
        world = World(plan(task(gates=("check",))), prose("Shall I go on?"), read,
                      *[failed()] * 2, config=config)
        world.run()
        ours = [line for line in world.ledger.lines if line.get("attempt") == 1]
        assert [total(ours, "tasks_total", s) for s in ko.VerdictStatus] == [
            s == word for s in ko.VerdictStatus]
        assert of(world, "cost_usd_total") == pytest.approx(world.state().cost_usd)


def test_what_the_interpreter_cannot_read_keeps_its_first_word() -> None:
    world = World(plan(), prose("Shall I go on?"), prose("Hm."),
                  config=ko.Config(interpreter="haiku"))
    world.run()
    (attempt,) = world.record().attempts
    assert of(world, "tasks_total", attempt.status) == 1
    assert sum(of(world, "tasks_total", s) for s in ko.VerdictStatus) == 1


def test_a_task_that_is_given_up_is_a_loop_by_its_type() -> None:
    world = World(plan(), *[failed()] * 3)
    world.run()
    assert of(world, "loops_detected_total", "attempts") == 1
    asked = World(plan(), asks(), asks())
    asked.run()
    asked.run(answer="red")
    assert of(asked, "loops_detected_total", "questions") == 1
    poor = World(plan(), failed(), config=ko.Config(max_cost_usd=0.2))
    poor.run()
    assert not any(of(poor, "loops_detected_total", type_)
                   for type_ in ("attempts", "questions"))


def test_a_parked_question_waits_for_a_person_until_the_run_goes_on() -> None:
    world = World(plan(), asks(), completed())
    world.run()
    assert (of(world, "escalations_total"), of(world, "waiting", "person")) == (1, 1)
    world.agent.before = lambda _: seen.append(of(world, "waiting", "person"))
    seen: list[float] = []
    world.clock.sleep(60)
    world.run(answer="red")
    assert seen == [0] and of(world, "escalations_total") == 1


def test_a_question_that_waits_through_further_starts_counts_once() -> None:
    world = World(plan(), asks())
    for _ in range(3):
        world.run()
        world.clock.sleep(60)
    assert (of(world, "escalations_total"), of(world, "waiting", "person")) == (1, 1)


def test_an_answered_question_no_longer_waits() -> None:
    world = World(plan(), asks(), completed(), terminal=FakeTerminal("a"))
    seen: list[float] = []
    world.agent.before = lambda _: seen.append(of(world, "waiting", "person"))
    world.run()
    assert seen == [0, 0] and of(world, "escalations_total") == 1


def test_an_outage_waits_for_the_api_and_a_logout_for_a_person() -> None:
    world = World(plan(), overloaded(), completed())
    world.clock.crashes = Crash()
    with pytest.raises(Crash):
        world.run()
    assert (of(world, "waiting", "api"), of(world, "waiting", "person")) == (1, 0)
    world.clock.crashes = None
    world.run()
    assert of(world, "waiting", "api") == 0
    assert of(world, "outage_wait_seconds") == sum(world.clock.slept) == 30
    locked_out = World(plan(), logged_out())
    locked_out.run()
    assert (of(locked_out, "waiting", "api"), of(locked_out, "waiting", "person")) == (
        0, 1)


def test_the_scenario_passes_fails_or_is_unclear() -> None:
    for status, word in (("passed", "completed"), ("failed", "failed"),
                         ("maybe", "needs_human")):
        world = World(plan(e2e=scenario()), completed(), reported(e2e_status=status,
                      status=status, diagnosis="d"), config=ko.Config(e2e_retries=0))
        world.run()
        assert of(world, "e2e_tests_total", word) == 1, word
    asked = of(world, "escalations_total"), of(world, "waiting", "person")
    assert asked == (1, 1)


def test_a_scenario_of_gates_alone_is_a_run_too() -> None:
    text = "## E2E Test\n\n**Verify:** `check`\n"
    world = World(plan(e2e=scenario(text=text, gates=("check",))), completed())
    world.run()
    assert of(world, "e2e_tests_total", "completed") == 1
    assert of(world, "tasks_total", "completed") == 1


def test_a_fix_counts_by_what_the_gates_say_of_it_and_is_no_loop() -> None:
    broken = reported(status="failed", diagnosis="d", fix_plan="f", fixable=True)
    world = World(plan(task(gates=("check",)), e2e=scenario()), completed(), broken,
                  completed(), broken, sandbox=FakeSandbox(check=[0, 0, 1]),
                  config=ko.Config(e2e_retries=0, max_fixes=1))
    for _ in range(3):                   # a further start only says it again
        world.run()
        world.clock.sleep(60)
    assert of(world, "e2e_fix_attempts_total", "false") == 1
    assert of(world, "loops_detected_total", "attempts") == 0
    assert of(world, "loops_detected_total", "e2e") == 1


def test_an_answer_whose_session_is_gone_is_no_attempt() -> None:
    world = World(plan(), asks(), session_gone(), completed())
    world.run()
    world.run(answer="red")
    assert [of(world, "tasks_total", s) for s in ko.VerdictStatus] == [1, 0, 1]


def test_an_outage_of_the_interpreter_leaves_nothing_waiting() -> None:
    world = World(plan(), prose("Shall I go on?"), overloaded(),
                  config=ko.Config(interpreter="haiku", on_question="recommend"))
    world.run()
    assert of(world, "waiting", "api") == 0


# As OTLP has it.

def encoded(lines: list[dict[str, Any]], start_ns: int = 1, now_ns: int = 2) -> Any:
    from opentelemetry.sdk.resources import Resource
    data = ko.metrics_data(totals_of(lines, "m"), Resource({}), start_ns,
                           now_ns)
    return {m.name: m for m in data.resource_metrics[0].scope_metrics[0].metrics}


def test_counters_are_cumulative_from_the_ledgers_birth() -> None:
    from opentelemetry.sdk.metrics.export import AggregationTemporality
    metrics = encoded([line(1), line(2, cost_usd=0.1)], start_ns=5, now_ns=9)
    assert set(metrics) == {f"orchestrator_{name}" for name in ko.METRICS}
    cost = metrics["orchestrator_cost_usd_total"]
    (point,) = cost.data.data_points
    assert (point.start_time_unix_nano, point.time_unix_nano) == (5, 9)
    assert point.value == 0.35
    assert point.attributes == {"milestone": "m"} and cost.data.is_monotonic
    kinds = {type(metric.data).__name__ for metric in metrics.values()}
    assert kinds == {"Sum", "Histogram"}
    assert not metrics["orchestrator_waiting"].data.is_monotonic     # so it is a gauge
    for metric in metrics.values():
        assert getattr(metric.data, "aggregation_temporality",
                       AggregationTemporality.CUMULATIVE) == 2
    assert len(metrics["orchestrator_tasks_total"].data.data_points) == 3


def test_units_would_become_part_of_prometheus_names_so_there_are_none() -> None:
    assert {m.unit for m in encoded([]).values()} == {"", "s"}
    assert all(m.unit == "s" for n, m in encoded([]).items() if n.endswith("_seconds"))


def test_a_histogram_has_each_duration_in_its_bucket() -> None:
    lines = [line(n, duration_s=s) for n, s in enumerate((0.0, 0.1, 0.2, 3, 7200, 9e4))]
    points = encoded(lines)["orchestrator_task_duration_seconds"].data.data_points
    (point,) = (p for p in points if p.attributes["status"] == "completed")
    counts = dict(zip([*ko.BUCKETS_S, "more"], point.bucket_counts, strict=True))
    assert {bound: n for bound, n in counts.items() if n} == {
        0.1: 2, 1: 1, 3: 1, 7200: 1, "more": 1}
    assert (point.count, point.sum, point.min, point.max) == (6, 97203.3, 0, 9e4)


# Real runs and a backend that decodes.

def cost(milestone: str) -> tuple[Any, ...]:
    return "orchestrator_cost_usd_total", ("milestone", milestone)


def spent(folder: Path, milestone: str) -> float:
    lines = (folder / "state/ledger.jsonl").read_text().splitlines()
    return round(sum(entry.get("cost_usd", 0.0) for entry in map(json.loads, lines)
                     if entry["milestone"] == milestone), 6)


@pytest.mark.contract
def test_totals_of_two_milestones_that_run_at_once_never_fall(tmp_path: Path) -> None:
    """Each posts what it replaces as of its own last look, the other may be ahead."""
    ledger, seen = tmp_path / "ledger.jsonl", list[tuple[int, float]]()
    ledger.touch()

    def post(found: ko.Totals, now_ns: int) -> None:
        if (cost := found.get(("cost_usd_total", "b", ""))) is not None:
            seen.append((now_ns, sum(cost.values())))

    posting = []
    for milestone in ("a", "b"):
        telemetry = ko.Telemetry({}, lambda _: None, tmp_path / milestone)
        telemetry._send(telemetry._push, ledger.open("a+b"), post)
        posting.append(telemetry)
        time.sleep(0.3)
    with ledger.open("a") as file:
        file.write(json.dumps(line(milestone="b")) + "\n")
    time.sleep(1.2)
    for telemetry in posting:
        telemetry.close()
    totals = [total for _, total in sorted(seen)]
    assert totals == sorted(totals) and totals[-1] == 0.25


@pytest.mark.contract
def test_a_run_posts_zeros_first_and_the_ledgers_totals_last(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    assert program.run("run", E2E, *LOCAL).returncode == 0
    first, *_, last = receiver.pushes
    key = cost("e2e_will_pass")
    costs = [push[key] for push in receiver.pushes]      # pairs: replaced, new
    assert costs[2::2] == costs[1:-1:2] and len(set(costs)) > 1
    assert set(first.values()) == {0} and first.keys() == last.keys()
    assert last[cost("e2e_will_pass")] == spent(repository, "e2e_will_pass") > 0
    status = ("milestone", "e2e_will_pass"), ("status", "completed")
    assert last["orchestrator_e2e_tests_total", *status] == 1


@pytest.mark.contract
@pytest.mark.slow
def test_totals_go_on_over_runs_under_one_identity(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    for plan_file in (HELLO, E2E, HELLO):
        assert program.run("run", plan_file, *LOCAL, "--fresh").returncode == 0
    key = cost("hello_world")
    totals = [push[key] for push in receiver.pushes if key in push]
    assert totals == sorted(totals) and totals[-1] == spent(repository, "hello_world")
    assert len({r["service.instance.id"] for r in receiver.resources}) == 1
    born_ns = int(receiver.resources[-1]["service.instance.id"])
    assert {*receiver.starts_ns} == {born_ns} and 0 < time.time_ns() - born_ns < 120e9


@pytest.mark.contract
@pytest.mark.slow
def test_two_first_runs_at_once_have_one_identity(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    for started in [program.start("run", p, *LOCAL) for p in (HELLO, E2E)]:
        assert started.communicate(timeout=60) and started.returncode == 0
    assert len({r["service.instance.id"] for r in receiver.resources}) == 1


@pytest.mark.contract
@pytest.mark.slow
def test_what_a_dead_backend_missed_comes_with_the_next_run_of_another_milestone(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    receiver.status = 503
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert receiver.pushes == []
    receiver.status = 200
    assert program.run("run", E2E, *LOCAL).returncode == 0
    assert receiver.pushes[1][cost("hello_world")] == spent(repository, "hello_world")


@pytest.mark.contract
def test_what_a_killed_run_spent_is_told_by_the_next(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url).scenarios({
        "killed/1.1": {"attempts": [
            [{"report": {"status": "failed", "summary": "s", "error": "e"}}],
            [{"hang": True}], [{"report": {"status": "completed", "summary": "s"}}]]}})
    plan_file = repository / "killed.md"
    plan_file.write_text("# Killed\n\n## Task 1.1: One\n\nDo it.\n")
    started = program.start("run", plan_file, *LOCAL)
    while len(program.calls()) < 2:
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert program.run("run", plan_file, *LOCAL).returncode == 0
    last = receiver.pushes[-1]
    assert last[cost("killed")] == spent(repository, "killed") > 0
    status = ("milestone", "killed"), ("status", "failed")
    assert last["orchestrator_tasks_total", *status] == 1


@pytest.mark.contract
@pytest.mark.parametrize("variable, value, sends", [
    ("OTEL_METRICS_EXPORTER", "none", {"traces"}),
    ("OTEL_TRACES_EXPORTER", "none", {"metrics"}),
    ("OTEL_SDK_DISABLED", "true", set())])
def test_each_signal_is_switched_off_by_its_standard_variable(
    repository: Path, receiver: OtlpReceiver, variable: str, value: str,
    sends: set[str],
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
                      **{variable: value})
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert sends == {name for name, got in (
        ("traces", receiver.spans), ("metrics", receiver.pushes)) if got}


@pytest.mark.contract
def test_a_users_service_name_and_instance_win(
    repository: Path, receiver: OtlpReceiver,
) -> None:
    program = Program(
        repository, OTEL_SERVICE_NAME="night", OTEL_RESOURCE_ATTRIBUTES=
        "service.instance.id=box,team=red",
        OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{receiver.url}/v1/metrics")
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert not receiver.spans and receiver.resources[-1] | {
        "service.name": "night", "service.instance.id": "box", "team": "red",
    } == receiver.resources[-1]
