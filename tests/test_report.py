"""The report: one page, the ledger's numbers, and nothing an agent wrote is alive."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TEST_PLANS
from fakes import (
    FakeClock,
    FakeSandbox,
    World,
    asks,
    completed,
    failed,
    new_state,
    plan,
    reported,
    scenario,
    task,
)
from program import LOCAL, Program

import ktrdr_orchestrator as ko

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'>&\x1b[31m"


class Page(html.parser.HTMLParser):
    """What a browser would make of it: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def saved(world: World) -> ko.RunState:
    """As the real store stamps it."""
    return replace(world.state(), updated_at=ko.stamp(world.clock.now()))


def page_of(world: World) -> Page:
    state = saved(world)
    lines = world.ledger.of_run(state)
    return Page(ko.report_page(state, world.plan, False, lines, {}))


def test_a_run_is_told_with_the_numbers_of_the_ledger() -> None:
    world = World(
        plan(task("1.1"), task("1.2")), failed("E-4711"), completed(), completed()
    )
    world.run()
    page = page_of(world)
    assert "m: completed, $0.75" in page.text and "E-4711" in page.text
    assert page.text.count("1:00, 30 tokens, $0.25") == 3
    assert page.tags.count("rect") == 5      # with the sandbox's start and the end
    assert page.text.count("  input: 10\n  output: 20\n") == 3
    assert "next: ktrdr-orchestrator fetch m.md" in page.text
    assert page.tags.count("h1") == 1 and not page.open[1:]


def test_a_question_an_answer_and_what_is_left_are_told() -> None:
    world = World(plan(), asks("Which <b>colour</b>?"), completed())
    world.run()
    page = page_of(world)
    assert "Task 1.1 asks: Which <b>colour</b>?" in page.text
    assert "next: ktrdr-orchestrator resume --answer TEXT m.md" in page.text


def test_fixes_flakiness_and_weakened_tests_are_told() -> None:
    sandbox = FakeSandbox()
    sandbox.changes = (
        "diff --git a/tests/test_a.py b/tests/test_a.py\n"
        "deleted file mode 100644\n--- a/tests/test_a.py\n"
        "+++ /dev/null\n@@ -1 +0,0 @@\n-assert a\n"
    )
    broken = reported(
        status="failed", diagnosis="it hung", fix_plan="wait", fixable=True
    )
    passed = reported(status="passed")
    world = World(
        plan(e2e=scenario()),
        completed(),
        broken,
        broken,
        completed(),
        broken,
        passed,
        sandbox=sandbox,
    )
    world.run()
    page = page_of(world)
    for words in (
        "e2e-fix-1",
        "flaky: failed 1 of 2 runs",
        "Tests say less now",
        "test file tests/test_a.py is gone",
        "it hung",
        "wait",
    ):
        assert words in page.text


def test_a_milestone_that_has_not_begun_has_a_page_too() -> None:
    state = new_state(plan(), FakeClock())
    state = replace(state, updated_at=state.started_at)
    page = Page(ko.report_page(state, plan(), True, (), {}))
    assert "m: running, $0.00" in page.text and "rect" not in page.tags


@pytest.mark.parametrize(
    "put", ["title", "evidence", "question", "status", "said", "finding"]
)
def test_hostile_text_is_inert_wherever_it_stands(put: str) -> None:
    def text(place: str) -> str:
        return HOSTILE if put == place else "plain"

    a_plan = plan(ko.Task("1.1", text("title"), 1, 2, text("title")))
    world = World(a_plan, failed(text("evidence")), asks(text("question")))
    world.run()
    state = replace(saved(world), findings=(text("finding"),))
    lines = [{**line, "status": text("status")} for line in world.ledger.lines]
    said = {line.get("transcript", "-"): text("said") for line in lines}
    told = ko.report_page(state, a_plan, False, lines, said)
    page = Page(told)
    assert not {"script", "img", "a", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in told
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", Page(told).text[:0])


@pytest.mark.contract
@pytest.mark.slow
def test_the_program_writes_the_page_of_a_run(repository: Path) -> None:
    program = Program(repository)
    fixable = TEST_PLANS / "e2e_will_fail_fixable.md"
    assert program.run("report", fixable, *LOCAL).returncode == 2
    assert program.run("run", fixable, *LOCAL).returncode == 0
    done = program.run("report", fixable, "-o", "night.html", *LOCAL)
    assert (done.returncode, done.stdout) == (0, "night.html\n"), done.stderr
    text = (repository / "night.html").read_text(encoding="utf-8")
    page, state = Page(text), program.state(fixable.stem)
    cost: Any = state["cost_usd"]
    assert f"completed, ${cost:.2f}" in page.text
    assert "divide with / instead of //" in page.text  # the fix plan
    assert "> Bash python3 -B -m converter 100" in page.text  # what an agent did
    assert not re.search(r"https?://|src=|href=", text)
    assert program.run("report", fixable, *LOCAL).stdout == (
        f"state/{fixable.stem}/report.html\n"
    )
