"""What backends say of runs is what the ledger says, to the cent, in every panel.

Two recorded days: short runs, milestones in parallel, a kill -9, a run over midnight,
an outage of the backend; then real runs. PromQL is spoken by VictoriaMetrics and by
Debian's Prometheus.
"""
from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from backends import Backend, Prometheus, VictoriaMetrics, until
from conftest import ROOT, TEST_PLANS
from fakes import totals_of
from program import LOCAL, Program

import ktrdr_orchestrator as ko

pytestmark = [pytest.mark.contract, pytest.mark.slow]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/orchestrator.json").read_text())
ALERTS = dict(re.findall(
    r"alert: (\w+)\n +expr: (?:\|\n)?(.+?)\n +(?:for|labels):",
    (DEPLOY / "alerts.yml").read_text(), re.DOTALL))
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
DAYS = TODAY - timedelta(days=2), TODAY - timedelta(days=1)
TOKENS = {"input": 100, "output": 10, "cache_read": 1000, "cache_creation": 50}


@dataclass(frozen=True)
class Event:
    """Something that a run of a milestone wrote into the ledger at a time."""

    at: datetime
    milestone: str
    what: str                    # a verdict, or with a prefix e2e-, fix-, gate-; a kind
    cost_usd: float = 0.0
    duration_s: float = 0.0

    @property
    def lines(self) -> list[dict[str, Any]]:
        base = {"at": self.at.isoformat(), "milestone": self.milestone, "run": "r",
                "attempt": 1, "duration_s": self.duration_s}
        prefix, _, status = self.what.rpartition("-")
        if prefix == "kind":
            of = {"task": "1.1"} if status == "escalation" else {}
            return [base | of | {"kind": status}]
        if prefix == "advice":
            return [base | {"kind": "answer", "task": "1.1", "advice": status}]
        if prefix == "loop":
            return [base | {"kind": "loop_detected", "task": "1.1", "loop": status}]
        task = {"e2e": "e2e", "fix": "e2e-fix-1"}.get(prefix, "1.1")
        call = base | {"task": task, "status": status, "cost_usd": self.cost_usd,
                       "tokens": TOKENS}
        if prefix == "gate":     # the agent said completed
            return [call | {"status": "completed", "is_open": True},
                    call | {"kind": "gate", "cost_usd": 0.0, "tokens": {}}]
        return [call]


@dataclass(frozen=True)
class Run:
    """Posts from its start to its end, or until it is killed; none if nobody hears."""

    milestone: str
    day: int
    clock: str
    minutes: float
    events: Sequence[tuple[float, str, float, float]]    # minute, what, cost, duration
    dies: bool = False
    is_heard: bool = True

    @property
    def start(self) -> datetime:
        hour, minute = map(int, self.clock.split(":"))
        return DAYS[self.day] + timedelta(hours=hour, minutes=minute)

    def happened(self) -> list[Event]:
        begun = Event(self.start + timedelta(seconds=1), self.milestone,
                      "kind-sandbox_reset", duration_s=0.75)
        ended = () if self.dies else ((self.minutes, "kind-end", 0, 0),)
        return [begun, *(Event(self.start + timedelta(minutes=at), self.milestone, what,
                               cost, duration) for at, what, cost, duration
                         in (*self.events, *ended))]

    def posts(self) -> list[datetime]:
        """At the start and after each event."""
        events = [event.at for event in self.happened()]
        told = events[:-1] if self.dies else events
        return sorted({self.start, *told}) if self.is_heard else []


RUNS = (
    Run("M1", 0, "01:00", 12, [(4, "failed", 0.30, 170),
                               (10, "gate-completed", 0.42, 290)]),
    Run("M1", 0, "04:00", 5.5, [(2, "completed", 0.25, 110),
                                (5.5, "failed", 0.11, 100)], dies=True),
    Run("M2", 0, "04:01", 20, [(3, "completed", 0.77, 95), (9, "gate-failed", 0.13, 90),
                               (10, "loop-attempts", 0, 0),
                               (18, "needs_human", 0.05, 40),
                               (18.1, "kind-escalation", 0, 0)]),
    Run("M3", 0, "10:00", 180, [(160, "completed", 25.00, 9500)]),
    Run("M1", 0, "23:50", 30, [(10 + 20 / 60, "completed", 0.50, 600),
                               (15, "e2e-failed", 0.07, 60),
                               (20, "fix-completed", 0.09, 120),
                               (28, "e2e-completed", 0.07, 60)]),
    Run("M2", 1, "10:00", 12, [(0.1, "advice-followed", 0, 0),
                               (5, "completed", 0.21, 200), (6, "outage", 0.0, 1),
                               (11, "kind-outage_wait", 0, 300),
                               (12, "fix-failed", 0.04, 30)], is_heard=False),
    Run("M1", 1, "12:00", 3, [(2, "completed", 0.02, 19)]),
    *(Run("M4", 1, clock, 2, [(1, "failed", 0.01, 30)])
      for clock in ("14:00", "15:00", "16:00")))
EVENTS = sorted((e for run in RUNS for e in run.happened()), key=lambda e: e.at)


def recorded(run: Run) -> Iterator[tuple[datetime, Any]]:
    """What this run posts when: its totals as they were, then all as they are."""
    from opentelemetry.sdk.resources import Resource

    def totals(at: datetime) -> Any:
        lines = [line for e in EVENTS if e.at <= at for line in e.lines]
        return totals_of(lines, run.milestone)
    before = totals(run.start)
    for at in run.posts():
        ours = {key: n for key, n in before.items() if key[1] == run.milestone}
        before = totals(at)
        start_ns = int(EVENTS[0].at.timestamp() * 1e9)
        for found, when in ((ours, at - timedelta(milliseconds=1)), (before, at)):
            yield when, ko.metrics_data(
                found, Resource({"service.name": ko.PROGRAM}), start_ns,
                int(when.timestamp() * 1e9))


@pytest.fixture(scope="module", params=[VictoriaMetrics, Prometheus],
                ids=["victoria-metrics", "vmagent-prometheus"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
            ) -> Iterator[Backend]:
    """Both days have been told to it."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
        OTLPMetricExporter,
    )
    from opentelemetry.sdk.metrics.export import MetricExportResult
    posts = sorted((post for run in RUNS for post in recorded(run)),
                   key=lambda post: post[0])
    with request.param(tmp_path_factory.mktemp("backend")) as server:
        exporter = OTLPMetricExporter(endpoint=server.otlp, timeout=20)
        for _, data in posts:
            assert exporter.export(data) is MetricExportResult.SUCCESS
        last = RUNS[-1]
        seen = f"last_over_time(orchestrator_tasks_total{{milestone='{last.milestone}'"
        seen += ",status='failed'}[1m])"
        end = last.start + timedelta(minutes=last.minutes, seconds=1)
        until(lambda: [*server.query(seen, end.timestamp()).values()] == [3],
              "the last post is in the backend")
        yield server


# Truth, from what happened.

def happened(*whats: str, day: int | None = None, milestone: str = "") -> list[Event]:
    return [e for e in EVENTS if (not whats or e.what in whats)
            and (day is None or DAYS[day] <= e.at < DAYS[day] + timedelta(days=1))
            and milestone in ("", e.milestone)]


def count(*whats: str, day: int | None = None) -> float:
    return len(happened(*whats, day=day))


def by_milestone(value: Callable[[str], float]) -> dict[str, float]:
    return {m: value(m) for m in sorted({e.milestone for e in EVENTS})}


def dollars(milestone: str = "", day: int | None = None) -> float:
    return sum(e.cost_usd for e in happened(day=day, milestone=milestone))


DONE = ("completed", "gate-completed")
FAILED = ("failed", "gate-failed")
CALLS = (*DONE, *FAILED, "needs_human", "outage", "e2e-completed", "e2e-failed",
         "fix-completed", "fix-failed")
E2E = ("e2e-completed", "e2e-failed")
# by title: what each query is to say of both days
TOTALS: dict[str, list[dict[str, float]]] = {
    "Cost": [{"": dollars()}],
    "Task success rate": [{"": count(*DONE) / count(*DONE, *FAILED)}],
    "Escalations": [{"": 1 / count(*DONE, *FAILED, "needs_human")}, {"": 1}],
    "Waiting for a person": [{"": 0}],
    "E2E pass rate": [{"": count("e2e-completed") / count(*E2E)}],
    "E2E flakiness": [{"": 0}],
    "Loops detected": [{"attempts": 1, "questions": 0, "e2e": 0}],
    "Milestones": [
        by_milestone(lambda m: len(happened(*DONE, milestone=m))),
        by_milestone(lambda m: len(happened(*FAILED, milestone=m))),
        by_milestone(dollars),
        by_milestone(lambda m: 1160 * len(happened(*CALLS, milestone=m))),
        by_milestone(lambda m: len(happened("kind-escalation", milestone=m))),
        *[by_milestone(lambda m: 0)] * 3]}


def of_day(day: int) -> dict[str, list[dict[str, float]]]:
    """By title: what each query is to say of the day."""
    calls = count(*CALLS, day=day)
    resets = by_milestone(lambda m: len(happened("kind-sandbox_reset", day=day,
                                                 milestone=m)))
    return {
        "Cost per day": [by_milestone(lambda m: dollars(m, day))],
        "Attempts per day": [{
            "completed": count(*DONE, day=day), "failed": count(*FAILED, day=day),
            "needs_human": count("needs_human", day=day)}],
        "Tokens per day": [{kind: n * calls for kind, n in TOKENS.items()}],
        "Trouble per day": [
            {"": count("kind-escalation", day=day)},
            {"": count("loop-attempts", day=day)},
            {"true": count("fix-completed", day=day),
             "false": count("fix-failed", day=day)}],
        "E2E runs per day": [{
            "completed": count("e2e-completed", day=day),
            "failed": count("e2e-failed", day=day), "needs_human": 0}],
        "Outage waiting per day": [by_milestone(lambda m: sum(
            e.duration_s for e in happened("kind-outage_wait", day=day, milestone=m)))],
        "Reset time by day": [{m: 0.75 for m, n in resets.items() if n}]}


PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
QUANTILES = {"Attempt duration": None, "Attempt duration by day": 0}


def expression(text: str) -> str:
    return text.replace("$__range", "7d").replace("$milestone", ".*")


def answers(backend: Backend, title: str, at: datetime) -> list[dict[str, float]]:
    return [backend.query(expression(target["expr"]), at.timestamp())
            for target in PANELS[title]["targets"]]


def test_every_panel_has_its_truth_in_these_tests() -> None:
    assert PANELS.keys() == TOTALS.keys() | of_day(0).keys() | QUANTILES.keys()
    assert set(re.findall(r"alert: (\w+)", (DEPLOY / "alerts.yml").read_text())) \
        == ALERTS.keys()


@pytest.mark.parametrize("title", TOTALS)
def test_a_panel_of_totals_says_what_happened(backend: Backend, title: str) -> None:
    for found, truth in zip(answers(backend, title, TODAY), TOTALS[title], strict=True):
        assert found == pytest.approx(truth, abs=1e-6), title


@pytest.mark.parametrize("title", of_day(0))
@pytest.mark.parametrize("day", [0, 1])
def test_a_panel_of_days_says_what_happened_on_each(
    backend: Backend, title: str, day: int,
) -> None:
    """A milestone that nobody posted for that day may be missing from it."""
    truths = of_day(day)[title]
    for found, truth in zip(answers(backend, title, DAYS[day]), truths, strict=True):
        seen = {key: found.get(key, 0) for key in truth}
        assert seen == pytest.approx(truth, abs=1e-6) and found.keys() <= truth.keys()


@pytest.mark.parametrize("title", QUANTILES)
def test_half_and_95_percent_of_the_attempts_fall_into_the_bucket_that_is_told(
    backend: Backend, title: str,
) -> None:
    day = QUANTILES[title]
    at = TODAY if day is None else DAYS[day]
    durations = sorted(e.duration_s for e in happened(
        *DONE, *FAILED, "needs_human", day=day))
    for q, found in zip((0.5, 0.95), answers(backend, title, at), strict=True):
        edges = [0.0, *ko.BUCKETS_S]
        truth = durations[min(int(q * len(durations)), len(durations) - 1)]
        high = next((e for e in edges if truth <= e), edges[-1])
        low = max(e for e in edges if e < min(truth, edges[-1]))
        assert low <= found[""] <= high, (q, truth)


@pytest.mark.parametrize("alert, day, clock, truth", [
    ("MilestoneWaitsForPerson", 0, "04:30", {"M2": 1}),
    ("MilestoneWaitsForPerson", 1, "12:10", {}),        # M2 went on, and M1 told it
    ("MilestoneStuck", 0, "04:10", {}),                 # it was at work just now
    ("MilestoneStuck", 0, "05:00", {"M1": 1}),          # killed
    ("MilestoneStuck", 1, "02:00", {}),
    ("MilestoneCostPerHour", 0, "12:50", {"M3": 25.0}),
    ("MilestoneCostPerHour", 0, "14:00", {}),
    ("MilestoneWithoutSuccess", 1, "15:30", {}),
    ("MilestoneWithoutSuccess", 1, "16:30", {"M4": 3}),
])
def test_an_alert_fires_when_it_is_true_and_only_then(
    backend: Backend, alert: str, day: int, clock: str, truth: dict[str, float],
) -> None:
    hour, minute = map(int, clock.split(":"))
    at = DAYS[day] + timedelta(hours=hour, minutes=minute)
    assert backend.query(ALERTS[alert], at.timestamp()) == pytest.approx(truth)


def test_the_query_of_the_manual_gives_the_cost_of_a_milestone_and_day(
    backend: Backend,
) -> None:
    manual = (ROOT / "docs/telemetry.md").read_text()
    (query,) = re.findall(r"```promql\n(sum by .+?)\n```", manual, re.DOTALL)
    for day in (0, 1):
        midnight = DAYS[day] + timedelta(days=1)
        found = backend.query(query, midnight.timestamp())
        assert {m: round(usd, 2) for m, usd in found.items() if usd} == {
            m: round(dollars(m, day), 2) for m in found if dollars(m, day)}


# Real runs.

def test_what_real_runs_spent_is_what_the_backend_says(
    backend: Backend, repository: Path,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=backend.otlp)
    plans = [TEST_PLANS / f"{name}.md" for name in (
        "e2e_will_pass", "doomed_to_fail", "ambiguous_task")]
    started = [program.start("run", plan, *LOCAL) for plan in plans]
    for process in started:
        process.communicate(timeout=120)
    assert [process.returncode for process in started] == [0, 1, 3]
    lines = [json.loads(line) for line in
             (repository / "state/ledger.jsonl").read_text().splitlines()]
    truth = {plan.stem: sum(line.get("cost_usd", 0) for line in lines
                            if line["milestone"] == plan.stem) for plan in plans}
    window = "[1h]"
    cost = (f"sum by (milestone) (max_over_time(orchestrator_cost_usd_total{window}) - "
            f"min_over_time(orchestrator_cost_usd_total{window}))")

    def told(query: str) -> dict[str, float]:
        found = backend.query(query, time.time())
        return {m: round(n, 6) for m, n in found.items() if m in truth}
    until(lambda: told(cost) == {m: round(n, 6) for m, n in truth.items()},
          f"the backend says {truth}")
    growth = cost.replace("orchestrator_cost_usd_total", "{}")
    failed = growth.format(*['orchestrator_tasks_total{status="failed"}'] * 2)
    until(lambda: told(failed) == {
        "e2e_will_pass": 0, "doomed_to_fail": 3, "ambiguous_task": 0}, "three failures")
    until(lambda: told(ALERTS["MilestoneWaitsForPerson"]) == {"ambiguous_task": 1},
          "the parked question is seen")
