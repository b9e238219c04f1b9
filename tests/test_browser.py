"""The report as people get it: opened in headless Chromium, offline, as a file."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import TEST_PLANS, missing
from playwright.sync_api import Browser, Page, sync_playwright
from program import LOCAL, Program

pytestmark = pytest.mark.contract
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
HOSTILE = (
    '"><script>window.hacked = 1</script><img src="https://192.0.2.1/x" '
    "onerror=\"window.hacked = 2\"><svg onload=window.hacked=3></svg>'"
    "<style>body{background:url(https://192.0.2.1/y)}</style>"
    '<a href="javascript:window.hacked=4">x</a><iframe src="//192.0.2.1/"></iframe>'
    "<base href=//192.0.2.1/><meta http-equiv=refresh content=0;url=//192.0.2.1/>"
    "</title></pre></details></main>]]>-->")
PLAN = """# The {0} milestone

## Task 1.1: A {0} task

**Acceptance Criteria:**
- [ ] {0}

**Verify:** `printf '%s' {1}; test -e done.txt`

## E2E Test

Look at {0}.
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if not path:
        missing("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        # a page of ours needs no sandbox, and root cannot have one
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page as it was opened, and what it did besides being there."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def read(self, report: Path) -> None:
        self.page.on("request", lambda sent: self.requests.append(sent.url))
        self.page.on("console", lambda told: self.complaints.append(told.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda shown: self.complaints.append(shown.message))
        self.page.goto(report.as_uri())
        for place in self.page.locator("rect, summary, td, pre").all():
            place.dispatch_event("mouseover")
            place.dispatch_event("click")
        self.page.evaluate(
            "document.querySelectorAll('details').forEach(d => { d.open = true })")


def visit(browser: Browser, report: Path, width: dict[str, int] = WIDE,
          scheme: Any = "light") -> Visit:
    context = browser.new_context(color_scheme=scheme, viewport=width)  # type: ignore
    seen = Visit(context.new_page())
    seen.read(report)
    return seen


def a_night(repository: Path, text: str) -> Path:
    """The report of a run with that text wherever a plan, an agent or a person can
    put it: a failed gate, a question, its answer, an E2E fix, weakened tests."""
    plan = repository / "night.md"
    gate = "'" + text.replace("'", "'\\''").replace("`", "") + "'"
    plan.write_text(PLAN.format(text, gate))
    program = Program(repository).scenarios({
        "night/1.1": {"attempts": [
            [{"say": text}, {"bash": f"echo {gate} >&2; false"},
             {"report": {"status": "completed", "summary": text}}],
            [{"report": {"status": "failed", "error": text}}],
            [{"report": {"status": "needs_human", "question": text,
                         "options": [text, "other"], "recommendation": text}}]]},
        "night/1.1/answer": {"attempts": [
            [{"bash": "touch done.txt; mkdir tests; echo >tests/test_a.py assert 1"},
             {"report": {"status": "completed", "summary": text}}]]},
        "night/e2e": {"attempts": [
            [{"report": {"status": "failed", "diagnosis": text, "fixable": True,
                         "fix_plan": text}}],
            [{"report": {"status": "passed", "steps": [text]}}]]},
        "night/fix": {"attempts": [
            [{"write": f"tests/{'x' * 9}.py", "content": text},
             {"report": {"status": "completed", "summary": text}}]]}})
    once = (*LOCAL, "--e2e-retries", "0")
    assert program.run("run", plan, *once).returncode == 3
    done = program.run("resume", plan, "--answer", text, *once)
    assert done.returncode == 0, done.stderr
    assert program.run("report", plan, "-o", "night.html").returncode == 0
    return repository / "night.html"


@pytest.fixture
def night(repository: Path) -> Path:
    return a_night(repository, "plain")


def test_hostile_text_in_every_field_is_shown_and_does_nothing(
    browser: Browser, repository: Path,
) -> None:
    seen = visit(browser, report := a_night(repository, HOSTILE))
    assert seen.requests == [report.as_uri()] and not seen.complaints
    assert seen.page.evaluate("window.hacked") is None
    assert seen.page.url == report.as_uri()
    words = seen.page.inner_text("main")
    assert words.count("<script>window.hacked = 1</script>") > 15
    for name in ("script", "img", "a", "iframe", "base", "link"):
        assert seen.page.locator(name).count() == 0, name


@pytest.mark.slow
def test_even_a_script_that_stood_in_the_page_would_not_run(
    browser: Browser, night: Path,
) -> None:
    text = night.read_text("utf-8")
    night.write_text(text.replace("<h1>", "<script>window.hacked = 1</script>"
                                  '<img src="https://192.0.2.1/x"><h1>'))
    seen = visit(browser, night)
    assert seen.page.evaluate("window.hacked") is None
    assert len(seen.complaints) == 2     # one for each from the page's own policy


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_fits_its_screen_in_both_colour_schemes(
    browser: Browser, night: Path, width: dict[str, int], scheme: str,
) -> None:
    seen = visit(browser, night, width, scheme)
    assert not seen.complaints and seen.requests == [night.as_uri()]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width["width"]
    ratio = seen.page.evaluate(CONTRAST)
    assert ratio and min(ratio.values()) >= 3.0, ratio   # WCAG's least, of large text
    assert seen.page.screenshot(full_page=True)


@pytest.mark.slow
def test_the_page_prints_and_is_told_to_those_who_do_not_see_it(
    browser: Browser, night: Path,
) -> None:
    seen = visit(browser, night)
    tree = seen.page.locator("body").aria_snapshot()
    for told in ('heading "night: completed', "[level=1]", 'heading "Left to do"',
                 "- table", 'cell "completed"', 'heading "Timeline"'):
        assert told in tree, told
    assert seen.page.locator("html").get_attribute("lang") == "en"
    assert seen.page.locator("h1").count() == 1
    assert seen.page.pdf()[:5] == b"%PDF-"


@pytest.mark.slow
def test_the_page_of_a_milestone_is_one_file_that_says_what_the_ledger_says(
    browser: Browser, repository: Path,
) -> None:
    program = Program(repository)
    plan = TEST_PLANS / "e2e_will_fail_fixable.md"
    assert program.run("run", plan, *LOCAL).returncode == 0
    assert program.run("report", plan, "-o", "r.html").returncode == 0
    words = visit(browser, repository / "r.html").page.inner_text("main")
    cost_usd: Any = program.state(plan.stem)["cost_usd"]
    assert f"${cost_usd:.2f}" in words
    calls = [line for line in program.ledger() if line.get("transcript")]
    for line in calls:
        assert f"${line['cost_usd']:.2f}" in words
        assert f"{sum(line['tokens'].values())} tokens" in words


# Of each coloured word with the page behind it: relative luminance as WCAG 2 has it.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d');
  const luminance = colour => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
      v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  canvas.fillStyle = 'Canvas';
  const page = luminance(getComputedStyle(document.documentElement).colorScheme &&
    matchMedia('(prefers-color-scheme: dark)').matches ? '#121212' : '#ffffff');
  const found = {};
  for (const word of document.querySelectorAll('b, td, p, h1, h2')) {
    const mine = luminance(getComputedStyle(word).color);
    found[word.className + ' ' + word.tagName] =
      (Math.max(mine, page) + 0.05) / (Math.min(mine, page) + 0.05) }
  return found }"""
