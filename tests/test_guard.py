"""Section 7: what a diff does to the tests, each with its counterpart."""

from __future__ import annotations

import pytest
from fakes import FakeSandbox, FakeTerminal, World, completed, plan, task, waiting

import ktrdr_orchestrator as ko


def edited(path: str, *lines: str) -> str:
    return (
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n"
        + "".join(f"{line}\n" for line in lines)
    )


def made(path: str, *lines: str) -> str:
    return (
        f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n"
        f"+++ b/{path}\n@@ -0,0 +1 @@\n" + "".join(f"+{line}\n" for line in lines)
    )


def deleted(path: str, *lines: str) -> str:
    return (
        f"diff --git a/{path} b/{path}\ndeleted file mode 100644\n--- a/{path}\n"
        "+++ /dev/null\n@@ -1 +0,0 @@\n" + "".join(f"-{line}\n" for line in lines)
    )


@pytest.mark.parametrize(
    ("diff", "told"),
    [
        (deleted("tests/test_a.py", "assert a"), "test file tests/test_a.py is gone"),
        (deleted("src/app.test.ts", "expect(a)"), "test file src/app.test.ts is gone"),
        (
            "diff --git a/tests/test_a.py b/old/a.txt\nsimilarity index 100%\n"
            "rename from tests/test_a.py\nrename to old/a.txt\n",
            "test file tests/test_a.py is gone",
        ),
        (
            edited("tests/test_a.py", "+@pytest.mark.skip"),
            "tests/test_a.py skips: @pytest.mark.skip",
        ),
        (
            edited("tests/test_a.py", "+    pytest.skip('no')"),
            "tests/test_a.py skips: pytest.skip('no')",
        ),
        (edited("a_test.go", "+\tt.Skip()"), "a_test.go skips: t.Skip()"),
        (
            edited("web/a.spec.js", "+it.skip('x', f)"),
            "web/a.spec.js skips: it.skip('x', f)",
        ),
        (edited("web/a.spec.js", "+xit('x', f)"), "web/a.spec.js skips: xit('x', f)"),
        (
            edited("src/AppTests.java", "+  @Disabled"),
            "src/AppTests.java skips: @Disabled",
        ),
        (
            made("tests/test_new.py", "@unittest.expectedFailure"),
            "tests/test_new.py skips: @unittest.expectedFailure",
        ),
        (
            edited(
                "tests/test_a.py", "-    assert a", "-    assert b", "+    assert c"
            ),
            "tests/test_a.py has 1 assertions less",
        ),
        (
            edited(".github/workflows/ci.yml", "-  run: pytest", "+  run: true"),
            ".github/workflows/ci.yml was changed, and decides what is tested",
        ),
        (edited("tox.ini", "+x"), "tox.ini was changed, and decides what is tested"),
        (
            edited("check.sh", "+exit 0"),
            "check.sh was changed, and decides what is tested",
        ),
    ],
)
def test_what_weakens_the_tests_is_found(diff: str, told: str) -> None:
    assert ko.weakened(diff, ["sh check.sh"]) == (told,)


@pytest.mark.parametrize(
    "diff",
    [
        made("tests/test_a.py", "assert a"),
        edited("src/app.py", "-assert a", "+pass"),
        edited("src/skip.py", "+@pytest.mark.skip"),
        edited("tests/test_a.py", "-    assert a", "+    assert b"),
        edited("tests/test_a.py", "-    assert a")
        + made("tests/test_b.py", "assert a"),
        made(".github/workflows/ci.yml", "x"),
        made("check.sh", "x"),
        edited("other.sh", "+x"),
        edited("tests/test_a.py", "+    # we do not skip anything"),
        "diff --git a/tests/test_a.py b/tests/test_b.py\nsimilarity index 100%\n"
        "rename from tests/test_a.py\nrename to tests/test_b.py\n",
        "",
    ],
)
def test_what_does_not_weaken_them_is_not(diff: str) -> None:
    assert ko.weakened(diff, ["sh check.sh"]) == ()


def world(*answers: str, guard: str = "strict") -> World:
    sandbox = FakeSandbox()
    sandbox.changes = deleted("tests/test_a.py", "assert a")
    return World(
        plan(task()),
        completed(),
        sandbox=sandbox,
        config=ko.Config(guard=guard),
        terminal=FakeTerminal(*answers),
    )


def test_weakened_tests_are_told_and_kept_in_the_state() -> None:
    a = world(guard="report")
    state = a.run()
    assert state.findings == ("test file tests/test_a.py is gone",)
    assert ko.exit_code(a.plan, state) is ko.ExitCode.OK
    assert "guard: test file tests/test_a.py is gone" in a.told.getvalue()


def test_a_strict_guard_makes_a_question_of_it() -> None:
    a = world()
    state = a.run()
    assert ko.exit_code(a.plan, state) is ko.ExitCode.NEEDS_HUMAN
    assert waiting(state) == ["guard"]
    asked = state.record("guard").question
    assert asked and "test_a.py is gone" in asked.text


@pytest.mark.parametrize(
    ("answer", "code"), [(ko.ACCEPTED, ko.ExitCode.OK), ("reject", ko.ExitCode.FAILED)]
)
def test_a_person_decides_on_weakened_tests(answer: str, code: ko.ExitCode) -> None:
    a = world()
    a.run()
    assert ko.exit_code(a.plan, a.run(answer=answer)) is code
    assert ko.exit_code(a.plan, a.run()) is code  # and is not asked again


def test_at_a_terminal_the_guard_asks_at_once() -> None:
    a = world("a\n")
    assert ko.exit_code(a.plan, a.run()) is ko.ExitCode.OK


def test_consent_to_some_findings_is_none_to_others() -> None:
    a = world()
    a.run()
    assert ko.exit_code(a.plan, a.run(answer=ko.ACCEPTED)) is ko.ExitCode.OK
    a.sandbox.changes += deleted("tests/test_b.py", "assert b")
    assert waiting(a.run()) == ["guard"]


def test_a_guard_that_is_strict_no_more_takes_its_question_with_it() -> None:
    a = world()
    a.run()
    a.config = ko.Config(guard="report")
    assert ko.exit_code(a.plan, a.run()) is ko.ExitCode.OK
    assert waiting(a.state()) == []
