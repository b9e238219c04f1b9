"""E2E by the program itself: scripted agent, real git, real processes, real kills."""
from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from boxes import make_repository
from conftest import TEST_PLANS, missing
from fakes import totals_of
from program import LOCAL, Program, Screen

pytestmark = pytest.mark.contract
GREETER = TEST_PLANS / "e2e_will_pass.md"
CONVERTER = TEST_PLANS / "e2e_will_fail_fixable.md"
FIXABLE = "e2e_will_fail_fixable"
SHIPPED = json.loads((TEST_PLANS / "scenarios.json").read_text())
TASKS = ["One", "Task 1.1", "Task 1.2"]
BY_HAND = "passed, I checked"
COMPLETED = {"report": {"status": "completed", "summary": "done"}}
PASSED = [{"report": {"status": "passed", "diagnosis": "all is well"}}]
Steps = list[dict[str, Any]]


@pytest.fixture
def program(repository: Path) -> Program:
    return Program(repository)


def does(*scripts: str) -> Steps:
    return [*({"bash": script} for script in scripts), COMPLETED]


def fails(diagnosis: str, **more: Any) -> Steps:
    return [{"report": {"status": "failed", "diagnosis": diagnosis, **more}}]


def fixable(diagnosis: str) -> Steps:
    return fails(diagnosis, fixable=True, fix_plan="mend it")


def milestone(program: Program, scenario: str = "", gates: tuple[str, ...] = ("",),
              **attempts: list[Steps]) -> Path:
    """m.md: a task for each of the gates, then the scenario; `attempts` at t1, t2, ...,
    at e2e and at fix."""
    tasks = [f"## Task 1.{i}: Part {i}\n\nDo part {i}.\n" + (
        f"\n**Verify:** `{gate}`\n" if gate else "")
        for i, gate in enumerate(gates, start=1)]
    plan = program.cwd / "m.md"
    e2e = f"## E2E Test\n\n{scenario}\n" if scenario else ""
    plan.write_text("\n".join(["# M\n", *tasks, e2e]))
    program.scenarios({f"m/{k.replace('t', '1.')}": {"attempts": played}
                       for k, played in attempts.items()})
    return plan


def small(program: Program) -> Path:
    """A plan without a fault, done by one session."""
    return milestone(program, "**Verify:** `test -s part.txt`",
                     t1=[does("echo 1 >part.txt")])


def prompts(program: Program) -> list[str]:
    """Which sessions there were: `Task 1.1`, `E2E scenario (run 1)`, ..."""
    lines = (call["prompt"].partition("\n")[0] for call in program.calls())
    return [line.partition(" of milestone")[0] + (
        " " + line[line.index("("):] if "Task" not in line else "") for line in lines]


def subjects(program: Program, name: str) -> list[str]:
    log = program.git(name, "log", "--reverse", "--format=%s").splitlines()
    return [line.partition(":")[0] for line in log]


def is_as_it_should_be(program: Program, name: str) -> None:
    """The workspace stands on the branch, at the saved commit; nothing is alive."""
    state = program.state(name)
    assert program.git(name, "symbolic-ref", "--short", "HEAD") == state["branch"]
    assert program.git(name, "rev-parse", "HEAD") == state["head"]
    assert program.git(name, "status", "--porcelain") == ""
    until = time.monotonic() + 3
    while program.alive() and time.monotonic() < until:
        time.sleep(0.02)
    assert not program.alive()


# As the shipped plans describe it.


def test_a_milestone_that_works_is_proved_by_one_session(program: Program) -> None:
    done = program.run("run", GREETER, *LOCAL)
    assert done.returncode == 0, done.stderr
    assert prompts(program) == ["Task 1.1", "Task 1.2", "E2E scenario (run 1)"]
    assert subjects(program, "e2e_will_pass") == TASKS
    state = program.state("e2e_will_pass")
    assert (state["e2e_status"], state["task_attempt_counts"]["e2e"]) == (
        "completed", 1)
    is_as_it_should_be(program, "e2e_will_pass")


def was_fixed(program: Program) -> None:
    """How e2e_will_fail_fixable.md ends, whatever happened on the way."""
    state, records = program.state(FIXABLE), program.state(FIXABLE)["task_results"]
    assert state["e2e_status"] == "completed"
    *tasks, fix = subjects(program, FIXABLE)
    assert tasks == TASKS and fix.startswith("Task e2e-fix-")
    assert "celsius * 9 / 5" in program.git(FIXABLE, "show", "HEAD")
    assert program.git(FIXABLE, "diff", "--stat", "HEAD^", "HEAD").endswith(
        "1 file changed, 1 insertion(+), 1 deletion(-)")
    fixes = [r["status"] for i, r in records.items() if i.startswith("e2e-fix-")]
    assert fixes.count("completed") == 1 and len(fixes) <= 5
    calls = [(x["task"], x["attempt"], x.get("kind")) for x in program.ledger()
             if "cost_usd" in x and x.get("kind") != "gate"]
    assert len(calls) == len(set(calls))
    totals = totals_of(program.ledger(), FIXABLE)    # a kill may repeat a gate's line
    assert sum(totals["tasks_total", FIXABLE, "completed"].values()) == len(tasks) - 1
    assert sum(totals["e2e_fix_attempts_total", FIXABLE, "true"].values()) == 1
    for record in records.values():
        numbers = [attempt["number"] for attempt in record["attempts"]]
        assert numbers == sorted(set(numbers)) and len(numbers) <= record["started"]
    is_as_it_should_be(program, FIXABLE)


def test_a_milestone_that_fails_is_diagnosed_fixed_and_proved_unattended(
    program: Program,
) -> None:
    done = program.run("run", CONVERTER, *LOCAL)
    assert done.returncode == 0, done.stderr
    assert prompts(program) == [
        "Task 1.1", "Task 1.2", "E2E scenario (run 1)", "Task e2e-fix-1",
        "E2E scenario (run 2)"]
    assert "37 degrees give 98.0" in done.stderr
    assert "Fix: In converter/temperature.py divide with /" in done.stderr
    attempts = program.state(FIXABLE)["task_results"]["e2e"]["attempts"]
    assert [(a["status"], a["rule"], bool(a["turns"])) for a in attempts] == [
        ("failed", "gate", False), ("failed", "gate", True),
        ("completed", "structured", True)]
    was_fixed(program)


def test_at_a_terminal_enter_applies_the_fix_that_is_shown(program: Program) -> None:
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        screen.until("Apply fix? [Y/n] ")
        assert "37 degrees give 98.0" in screen.text and "Fix: In conv" in screen.text
        screen.type("\n")
        assert screen.end() == 0, screen.text
    was_fixed(program)


@pytest.mark.slow
def test_at_a_terminal_no_leads_to_the_question_and_words_of_ones_own_to_a_fix(
    program: Program,
) -> None:
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        screen.reply("Apply fix? [Y/n] ", "n\n")
        screen.until("later: ")
        assert f"a) {BY_HAND}" in screen.text and "b) skip this scenario" in screen.text
        screen.type("use true division\n")
        assert screen.end() == 0, screen.text
    was_fixed(program)


@pytest.mark.slow
@pytest.mark.parametrize(("letter", "reason"), [
    ("a", BY_HAND), ("b", "skip this scenario")])
def test_at_a_terminal_a_person_may_settle_the_scenario(
    program: Program, letter: str, reason: str,
) -> None:
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        screen.reply("Apply fix? [Y/n] ", "n\n")
        screen.reply("later: ", f"{letter}\n")
        assert screen.end() == 0, screen.text
    assert program.state(FIXABLE)["task_results"]["e2e"]["reason"] == (
        f"a person said: {reason}")
    assert subjects(program, FIXABLE) == TASKS
    is_as_it_should_be(program, FIXABLE)


@pytest.mark.slow
def test_who_leaves_the_terminal_finds_the_question_parked_and_can_guide_the_fix(
    program: Program,
) -> None:
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        for words in ("Apply fix? [Y/n] ", "later: "):
            screen.reply(words, "\x04")                     # Ctrl-D
        assert screen.end() == 3, screen.text
    assert program.run("run", CONVERTER, *LOCAL).returncode == 3
    assert len(program.calls()) == 3
    done = program.run("resume", CONVERTER, *LOCAL, "--answer", "use true division")
    assert done.returncode == 0, done.stderr
    was_fixed(program)


@pytest.mark.slow
def test_ctrl_c_at_the_offer_of_a_fix_leaves_it_for_the_next_start(program: Program,
                                                                   ) -> None:
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        screen.reply("Apply fix? [Y/n] ", "\x03")
        assert screen.end() == 130, screen.text
    assert program.run("run", CONVERTER, *LOCAL).returncode == 0
    assert len(program.calls()) == 5
    was_fixed(program)


def test_what_a_session_that_judges_changes_is_taken_back(program: Program) -> None:
    plan = milestone(program, "Look at it.", t1=[does("echo 1 >part.txt")], e2e=[
        [{"bash": "git rm -q part.txt; git commit -qm mine; git checkout -q -b mine; "
                  "echo 2 >part.txt; echo 3 >more.txt"}, *PASSED]])
    assert program.run("run", plan, *LOCAL).returncode == 0
    assert subjects(program, "m") == ["One", "Task 1.1"]
    is_as_it_should_be(program, "m")


@pytest.mark.slow
def test_the_scenario_alone_is_run_again_by_its_name(program: Program) -> None:
    program.run("run", GREETER, *LOCAL)
    again = program.run("task", GREETER, "e2e", *LOCAL)
    assert again.returncode == 0, again.stderr
    assert prompts(program)[3:] == ["E2E scenario (run 1)"]
    assert subjects(program, "e2e_will_pass") == TASKS
    is_as_it_should_be(program, "e2e_will_pass")


# kill -9.

STAGES = (
    r"Task e2e: E2E Test \(run 1\)",
    r"  e2e  Bash ",
    r"  e2e  failed by rule gate",
    r"^Fix: ",
    r"  e2e-fix-\d  Edit ",
    r"  e2e-fix-\d  completed by rule",
    r"  e2e-fix-\d  gate ",
    r"Task e2e-fix-\d completed",
    r"  e2e  StructuredOutput passed",
    r"  e2e  completed by rule",
)


@pytest.mark.slow
def test_killed_at_every_stage_one_after_the_other_it_ends_the_same(
    program: Program,
) -> None:
    often = ("run", CONVERTER, *LOCAL, "--max-attempts", "20")
    for pattern in STAGES:
        program.kill_at(pattern, *often)
    done = program.run(*often)
    assert done.returncode == 0, done.stderr
    was_fixed(program)
    counts = program.state(FIXABLE)["task_attempt_counts"]
    assert (counts["1.1"], counts["1.2"]) == (1, 1)
    assert 3 <= counts["e2e"] <= 3 + len(STAGES)


@pytest.mark.slow
def test_a_fix_that_was_killed_is_settled_before_the_next_is_asked_about(
    program: Program,
) -> None:
    program.kill_at(r"  e2e-fix-1  Edit ", "run", CONVERTER, *LOCAL)
    with Screen(program, "run", CONVERTER, *LOCAL) as screen:
        screen.reply("Resume from Task e2e? [Y/n] ", "\n")
        screen.reply("Apply fix? [Y/n] ", "\n")
        assert screen.end() == 0, screen.text
    assert screen.text.count("Apply fix?") == 1
    was_fixed(program)
    assert list(program.state(FIXABLE)["task_results"])[-2:] == [
        "e2e-fix-1", "e2e-fix-2"]


@pytest.mark.slow
def test_a_scenario_that_is_killed_again_and_again_is_given_up(program: Program,
                                                               ) -> None:
    for _ in range(3):
        program.kill_at(r"  e2e  Bash ", "run", GREETER, *LOCAL)
    assert program.run("run", GREETER, *LOCAL).returncode == 1
    assert "3 runs were cut short" in program.state("e2e_will_pass")[
        "task_results"]["e2e"]["reason"]
    assert len(program.calls()) == 2 + 3
    assert program.run("task", GREETER, "e2e", *LOCAL).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, 100])
def test_killed_at_any_instant_of_the_fix_cycle_the_next_start_ends_the_same(
    tmp_path: Path, rounds: int,
) -> None:
    done = Program(make_repository(tmp_path / "tasks are done"))
    for task in ("1.1", "1.2"):
        assert done.run("task", CONVERTER, task, *LOCAL).returncode == 0
    chance, takes_s = random.Random(5), 0.0
    for number in range(1 + rounds):     # the first one is not killed
        program = Program(shutil.copytree(done.cwd, tmp_path / str(number)))
        begun = time.monotonic()
        started = program.start("run", CONVERTER, *LOCAL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.communicate(timeout=chance.uniform(0, takes_s) if number else 60)
        started.kill()
        started.communicate()
        takes_s = takes_s or time.monotonic() - begun
        again = program.run("run", CONVERTER, *LOCAL)
        assert again.returncode == 0, again.stderr
        was_fixed(program)


# Gates outrank the agent, in both directions.


@pytest.mark.parametrize("runs", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_valid_code_passes_a_scenario_of_gates_each_time_without_a_call(
    program: Program, runs: int,
) -> None:
    plan = small(program)
    assert program.run("run", plan, *LOCAL).returncode == 0
    codes = {program.run("task", plan, "e2e", *LOCAL).returncode for _ in range(runs)}
    assert codes == {0} and prompts(program) == ["Task 1.1"]


@pytest.mark.parametrize("runs", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_an_agent_that_lies_never_passes(program: Program, runs: int) -> None:
    plan = milestone(program, "Look at it.\n\n**Verify:** `test -s never.txt`",
                     t1=[does("echo 1 >part.txt")], e2e=[PASSED])
    codes = {program.run("run", plan, *LOCAL, "--fresh").returncode
             for _ in range(runs)}
    assert codes == {3} and program.state("m")["e2e_status"] == "needs_human"
    assert prompts(program) == ["Task 1.1", "E2E scenario (run 1)"] * runs


def test_a_gate_that_fails_once_is_told_as_flaky(program: Program) -> None:
    flag = program.cwd / "was here"
    plan = milestone(program, f"**Verify:** `test -e '{flag}' || ! touch '{flag}'`",
                     t1=[does("echo 1 >part.txt")])
    assert program.run("run", plan, *LOCAL).returncode == 0
    assert program.state("m")["task_results"]["e2e"]["reason"] == (
        "flaky: failed 1 of 2 runs")
    shown = program.run("status", plan)
    assert "flaky: failed 1 of 2 runs" in shown.stdout


# Fixes and their limits.


@pytest.mark.slow
def test_a_fix_that_breaks_a_tasks_gate_is_taken_back_and_the_next_one_kept(
    program: Program,
) -> None:
    bad = [{"edit": "converter/temperature.py", "old": "celsius * 9 // 5 + 32",
            "new": "celsius * 9 / 5 + 32.001"}, COMPLETED]
    good = SHIPPED[f"{FIXABLE}/fix"]["attempts"][0]
    program.scenarios({**SHIPPED, f"{FIXABLE}/fix": {"attempts": [bad, good]}})
    done = program.run("run", CONVERTER, *LOCAL)
    assert done.returncode == 0, done.stderr
    was_fixed(program)
    fixes = program.state(FIXABLE)["task_results"]
    assert [fixes[f"e2e-fix-{n}"]["status"] for n in (1, 2)] == ["failed", "completed"]
    assert "gate `python3 -B -c" in fixes["e2e-fix-1"]["attempts"][0]["evidence"]
    rejected = f"refs/orchestrator/{FIXABLE}/rejected/e2e-fix-1-1"
    assert "32.001" in program.git(FIXABLE, "show", rejected)


def test_fixes_that_help_nothing_end_at_the_limit_and_stay_ended(program: Program,
                                                                 ) -> None:
    told = ["alpha beta", "one two three", "red green blue pink", "x"]
    plan = milestone(program, "Look at it.", t1=[does("echo 1 >part.txt")],
                     e2e=[fixable(words) for words in told],
                     fix=[does(f"echo {n} >fix.txt") for n in range(9)])
    once = ("run", plan, *LOCAL, "--e2e-retries", "0", "--max-fixes", "3")
    assert program.run(*once).returncode == 1
    assert "it fails after 3 fixes, limit 3" in program.state("m")["task_results"][
        "e2e"]["reason"]
    assert len(program.calls()) == 1 + 4 + 3
    assert program.run(*once).returncode == 1 and len(program.calls()) == 8
    is_as_it_should_be(program, "m")


LOG = "seq -f 'a long log says the same in line %g' 40; test -e a.txt -a -e b.txt"


@pytest.mark.parametrize(("second", "fixes"), [
    ("no port is open", 2), ("the file a.txt is still missing here", 1)])
def test_another_diagnosis_of_a_gate_that_says_the_same_deserves_another_fix(
    program: Program, second: str, fixes: int,
) -> None:
    plan = milestone(program, f"Look at it.\n\n**Verify:** `{LOG}`",
                     t1=[does("echo 1 >part.txt")], e2e=[
        fixable("the file a.txt is missing here"), fixable(second), PASSED],
        fix=[does("echo 1 >a.txt"), does("echo 1 >b.txt")])
    assert program.run("run", plan, *LOCAL).returncode == (0 if fixes == 2 else 1)
    records = program.state("m")["task_results"]
    assert len(records) == 2 + fixes
    assert ("the same diagnosis again" in records["e2e"]["reason"]) is (fixes == 1)


# Which task broke it.

BREAKS = {"t1": [does("echo 1 >a.txt")], "t2": [does("echo 2 >b.txt")],
          "t3": [does("rm a.txt")], "t4": [does("echo 4 >d.txt")],
          "e2e": [fixable("a.txt is missing"), PASSED],
          "fix": [does("echo 1 >a.txt")]}


def test_a_task_that_broke_the_gate_of_an_earlier_one_is_named(program: Program,
                                                               ) -> None:
    plan = milestone(program, "Look at it.", ("test -e a.txt", "", "", ""), **BREAKS)
    done = program.run("run", plan, *LOCAL)
    assert done.returncode == 0, done.stderr
    first = program.state("m")["task_results"]["e2e"]["attempts"][0]["evidence"]
    assert first.startswith(
        "first broken by task 1.3: task 1.1's gate `test -e a.txt`: exit 1")
    assert prompts(program)[4:] == ["E2E scenario (run 1)", "Task e2e-fix-1",
                                    "E2E scenario (run 2)"]
    is_as_it_should_be(program, "m")


@pytest.mark.parametrize("kills", [0, 3])
def test_bisect_names_the_task_that_broke_the_scenario_also_when_it_is_killed(
    program: Program, kills: int,
) -> None:
    plan = milestone(program, "**Verify:** `sleep 0.1; test -e a.txt`", ("",) * 4,
                     **BREAKS)
    bisected = ("run", plan, *LOCAL, "--e2e-bisect", "yes")
    for n in range(kills):       # at the first look, the first commit, the second
        program.kill_at("e2e  gate", *bisected, times=n + 1)
    done = program.run(*bisected)
    assert done.returncode == 0, done.stderr
    first = program.state("m")["task_results"]["e2e"]["attempts"][0]["evidence"]
    assert first.startswith("first broken by task 1.3: task e2e's gate `sleep 0.1; ")
    assert subjects(program, "m") == [
        "One", *(f"Task 1.{n}" for n in range(1, 5)), "Task e2e-fix-1"]
    is_as_it_should_be(program, "m")


# The guard, on what git really says.

TESTS = "def test_a():\n    x = 1\n    assert x\n    assert x == 1\n"
WEAKER = {
    "deletes": ("git rm -q tests/test_a.py", "test file tests/test_a.py is gone"),
    "moves": ("git mv tests/test_a.py a.txt", "test file tests/test_a.py is gone"),
    "skips": ("sed -i '1i import pytest\\n@pytest.mark.skip' tests/test_a.py",
              "tests/test_a.py skips: @pytest.mark.skip"),
    "asserts less": ("sed -i /==/d tests/test_a.py",
                     "tests/test_a.py has 1 assertions less"),
    "hides it as binary": (
        "sed -i /==/d tests/test_a.py; echo '* -diff' >.gitattributes",
        "tests/test_a.py has 1 assertions less"),
    "hides it by a filter": (
        "sed -i /==/d tests/test_a.py; echo '*.py diff=no' >.gitattributes; "
        "git config diff.no.textconv true; git config diff.external true; "
        "git config diff.noprefix true; git config diff.orderFile gone",
        "tests/test_a.py has 1 assertions less"),
    "edits its gate": ("echo true >check.sh",
                       "check.sh was changed, and decides what is tested"),
}


def with_tests(program: Program, script: str) -> Path:
    """A plan of one task, done by that script, in a repository that has a test."""
    files = {"tests/test_a.py": TESTS, "check.sh": "test -e part.txt"}
    for name, text in files.items():
        (program.cwd / name).parent.mkdir(exist_ok=True)
        (program.cwd / name).write_text(text)
    git(program.cwd, "add", "tests", "check.sh")
    git(program.cwd, "commit", "-qm", "Tests")
    return milestone(program, gates=("sh check.sh",),
                     t1=[does(f"echo 1 >part.txt; {script}")])


@pytest.mark.parametrize("how", WEAKER)
def test_a_test_that_says_less_is_listed_at_the_end(program: Program, how: str) -> None:
    script, told = WEAKER[how]
    done = program.run("run", with_tests(program, script), *LOCAL)
    assert done.returncode == 0, done.stderr
    assert program.state("m")["findings"] == [told] and f"guard: {told}" in done.stderr


def test_the_guard_looks_also_when_the_last_task_was_done_alone(program: Program,
                                                                ) -> None:
    plan = with_tests(program, WEAKER["deletes"][0])
    assert program.run("task", plan, "1.1", *LOCAL).returncode == 0
    done = program.run("run", plan, *LOCAL, "--guard", "strict")
    assert done.returncode == 3 and "test_a.py is gone" in done.stdout


def test_rejected_work_that_is_done_again_is_looked_at_anew(program: Program) -> None:
    strict = (with_tests(program, WEAKER["deletes"][0]), *LOCAL, "--guard", "strict")
    program.run("run", *strict)
    assert program.run("resume", *strict, "--answer", "b").returncode == 1
    program.scenarios({"m/1.1": {"attempts": [
        does("git checkout -q main tests/test_a.py")]}})
    assert program.run("task", strict[0], "1.1", *strict[1:]).returncode == 0
    assert program.run("run", *strict).returncode == 0
    assert program.state("m")["findings"] == []


def test_consent_to_one_weaker_test_is_none_to_the_next(program: Program) -> None:
    plan = with_tests(program, WEAKER["asserts less"][0])
    strict = (plan, *LOCAL, "--guard", "strict")
    program.run("run", *strict)
    assert program.run("resume", *strict, "--answer", "a").returncode == 0
    plan.write_text(f"{plan.read_text()}\n## Task 1.2: More\n\nMore.\n")
    program.scenarios({"m/1.2": {"attempts": [does(WEAKER["deletes"][0])]}})
    again = program.run("run", *strict)
    assert again.returncode == 3 and "test_a.py is gone" in again.stdout


def test_honest_work_is_not_listed(program: Program) -> None:
    plan = with_tests(program, "sed -i 's/x == 1/x <= 1/' tests/test_a.py; "
                  "git mv tests/test_a.py tests/test_b.py")
    done = program.run("run", plan, *LOCAL, "--guard", "strict")
    assert done.returncode == 0 and program.state("m")["findings"] == []


@pytest.mark.parametrize(("answer", "status"), [("accept them", 0), ("b", 1)])
def test_a_strict_guard_parks_and_a_person_decides(program: Program, answer: str,
                                                   status: int) -> None:
    strict = (with_tests(program, WEAKER["deletes"][0]), *LOCAL, "--guard", "strict")
    for _ in range(2):
        parked = program.run("run", *strict)
        assert parked.returncode == 3 and "test_a.py is gone" in (
            parked.stdout + parked.stderr)
    assert program.run("resume", *strict, "--answer", answer).returncode == status
    assert program.run("run", *strict).returncode == status
    assert len(program.calls()) == 1
    is_as_it_should_be(program, "m")


# Pull requests: git and gh of the host.

GH = """#!/bin/sh
printf '%s\\n' "$@" >"$GH_SAID.argv"; cat >"$GH_SAID.body"; pwd >"$GH_SAID.cwd"
[ ! -e "$GH_SAID.fails" ] || { echo 'not logged in' >&2; exit 4; }
echo https://example.invalid/pull/1
"""


class Hub:
    """A bare repository as origin, and a `gh` first in PATH that tells what it got."""

    def __init__(self, program: Program, folder: Path, *, has_gh: bool = True) -> None:
        self.origin, self.said = folder / "origin.git", folder / "gh"
        git(folder, "init", "-q", "--bare", str(self.origin))
        git(program.cwd, "remote", "add", "origin", str(self.origin))
        tools = folder / "bin"
        tools.mkdir()
        if has_gh:
            (tools / "gh").write_text(GH)
            (tools / "gh").chmod(0o755)
        program.environ |= {"GH_SAID": str(self.said), "PATH":
                            f"{tools}:{program.environ['PATH']}"}

    def got(self, what: str) -> str:
        path = self.said.with_name(f"gh.{what}")
        return path.read_text().strip() if path.exists() else ""


def git(folder: Path, *args: str) -> str:
    named = ("-c", "user.name=Somebody", "-c", "user.email=somebody@localhost")
    return subprocess.run(["git", *named, *args], cwd=folder, check=True,
                          capture_output=True, text=True).stdout.strip()


def was_pushed(program: Program, hub: Hub, name: str) -> bool:
    shown = git(hub.origin, "for-each-ref", "--format=%(refname) %(objectname)")
    head = program.state(name)["head"]
    return shown == f"refs/heads/orchestrator/{name} {head}"


def test_a_pull_request_is_opened_by_the_hosts_own_login(program: Program,
                                                         tmp_path: Path) -> None:
    hub = Hub(program, tmp_path)
    done = program.run("run", CONVERTER, *LOCAL, "--create-pr")
    assert done.returncode == 0, done.stderr
    assert "https://example.invalid/pull/1" in done.stdout
    assert hub.got("argv").split("\n") == [
        "pr", "create", "--head", f"orchestrator/{FIXABLE}",
        "--title", "Temperature Converter", "--body-file=-"]
    assert hub.got("cwd") == str(program.cwd)
    body = hub.got("body")
    for words in ("completed, $0.13", "Convert a temperature", "E2E fix 1",
                  "e2e: Both temperatures are right to the first decimal."):
        assert words in body
    assert was_pushed(program, hub, FIXABLE)


@pytest.mark.parametrize("lacking", ["gh", "gh's login", "origin"])
def test_what_cannot_be_sent_is_printed_to_be_sent_by_hand(
    program: Program, tmp_path: Path, lacking: str,
) -> None:
    hub = Hub(program, tmp_path, has_gh=lacking != "gh")
    if lacking == "gh" and shutil.which("gh"):
        missing("gh is installed here, the test needs a machine without it")
    if lacking == "origin":
        shutil.rmtree(hub.origin)
    hub.said.with_name("gh.fails").touch()
    done = program.run("run", small(program), *LOCAL, "--create-pr")
    assert done.returncode == 0, done.stderr
    assert "branch: orchestrator/m\ntitle: M\n" in done.stdout
    assert "e2e   completed" in done.stdout and "1.1: done" in done.stdout
    assert "warning: no pull request was made: " in done.stderr
    if lacking != "origin":
        assert was_pushed(program, hub, "m")


@pytest.mark.parametrize("reply", ["\n", "n\n", "\x04"], ids=["yes", "no", "Ctrl-D"])
def test_at_a_terminal_a_pull_request_is_offered_where_there_is_an_origin(
    program: Program, tmp_path: Path, reply: str,
) -> None:
    hub = Hub(program, tmp_path)
    with Screen(program, "run", small(program), *LOCAL) as screen:
        screen.reply("Create PR? [Y/n] ", reply)
        assert screen.end() == 0, screen.text
    assert bool(hub.got("argv")) is (reply == "\n")
    assert ("https://example.invalid/pull/1" in screen.text) is (reply == "\n")


def test_without_an_origin_nobody_is_asked(program: Program) -> None:
    with Screen(program, "run", small(program), *LOCAL) as screen:
        assert screen.end() == 0 and "Create PR?" not in screen.text


def test_a_pull_request_that_a_kill_prevented_is_made_by_the_next_start(
    program: Program, tmp_path: Path,
) -> None:
    hub = Hub(program, tmp_path)
    asked = ("run", small(program), *LOCAL, "--create-pr")
    program.run(*asked[:-1])                  # all but the last step
    done = program.run(*asked)
    assert done.returncode == 0 and "pull/1" in done.stdout
    assert was_pushed(program, hub, "m") and len(program.calls()) == 1


def test_a_milestone_that_is_not_done_gets_no_pull_request(program: Program,
                                                           tmp_path: Path) -> None:
    hub = Hub(program, tmp_path)
    plan = milestone(program, "Look at it.", t1=[does("echo 1 >part.txt")],
                     e2e=[fails("it is wrong", fixable=False)])
    assert program.run("run", plan, *LOCAL, "--create-pr").returncode == 3
    assert program.run("task", plan, "1.1", *LOCAL).returncode == 0
    assert not hub.got("argv") and not git(hub.origin, "for-each-ref")
