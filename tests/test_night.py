"""A night that nobody watches, hour by hour, on a clock of its own: docs/night.md."""
from __future__ import annotations

import dataclasses
import re
from datetime import timedelta
from typing import Any

from conftest import ROOT
from fakes import (
    Crash,
    FakeClock,
    FakeSandbox,
    Outcome,
    World,
    completed,
    limited,
    overloaded,
    plan,
    reported,
)

import ktrdr_orchestrator as ko

MIDNIGHT = FakeClock().now()
TITLES = {"1.1": "Model", "1.2": "Store", "1.3": "Service", "1.4": "Client",
          "1.5": "Command line"}


def at(clock: str) -> float:
    hours, minutes = map(int, clock.split(":"))
    return (MIDNIGHT + timedelta(hours=hours, minutes=minutes)).timestamp()


class Night(World):
    """Each call of the agent takes the minutes that stand beside its outcome."""

    def __init__(self, *calls: tuple[int, Outcome]) -> None:
        tasks = (ko.Task(i, title, 1, 2, f"text {i}") for i, title in TITLES.items())
        outcomes = (outcome if isinstance(outcome, BaseException) else
                    dataclasses.replace(outcome, duration_s=60 * minutes,
                                        usage=ko.Usage(cost_usd=minutes / 50))
                    for minutes, outcome in calls)
        super().__init__(plan(*tasks), *outcomes, sandbox=FakeSandbox())
        self.minutes = [minutes for minutes, _ in calls]
        self.agent.before = self.work

    def work(self, _call: Any) -> None:
        self.clock.sleep(60 * self.minutes.pop(0))

    def start(self, clock: str, command: str, answer: str = "") -> ko.ExitCode | None:
        """As cron or a person does; None: killed."""
        self.clock.sleep(at(clock) - self.clock.now().timestamp())
        self.told.write(f"$ {command}\n")
        try:
            status = ko.exit_code(self.plan, self.run(answer=answer))
        except Crash:
            self.told.write("Killed\n")
            return None
        self.told.write(f"exit status {int(status)}\n")
        return status


def test_a_night_with_a_limit_an_outage_a_crash_and_a_question() -> None:
    night = Night(
        (55, completed()), (5, limited(at("2:30"))), (29, completed()),
        (0, overloaded()), (0, overloaded()), (58, completed()),
        (10, Crash()), (40, completed()),
        (5, reported(status="needs_human", summary="one thing is open",
                     question="Which format do exports have?",
                     options=["CSV", "Parquet"], recommendation="CSV")),
        (20, completed()))
    run = "ktrdr-orchestrator run plan.md"
    assert night.start("0:00", run) is None
    assert night.start("4:15", run) is ko.ExitCode.NEEDS_HUMAN
    assert night.start("7:30", "ktrdr-orchestrator resume plan.md --answer a",
                       answer="CSV") is ko.ExitCode.OK
    assert [night.record(i).started for i in TITLES] == [1, 1, 1, 2, 2]
    assert night.clock.slept.count(60.0) == 91 + 1          # the limit, an outage
    assert not night.agent.outcomes and night.state().wait is None
    text = (ROOT / "docs/night.md").read_text(encoding="utf-8")
    shown = re.findall(r"```\n(.+?)```", text, re.DOTALL)
    assert shown == [night.told.getvalue()]
