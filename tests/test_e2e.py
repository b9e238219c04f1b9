"""E2E: the scenario is run, run again, fixed, and put to a person only at last."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from fakes import (
    Crash,
    FakeSandbox,
    FakeTerminal,
    MemoryStore,
    Outcome,
    World,
    asks,
    completed,
    ctrl_c,
    failed,
    logged_out,
    overloaded,
    plan,
    reported,
    scenario,
    task,
    waiting,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import ktrdr_orchestrator as ko

Status = ko.TaskStatus
PASSED = reported(status="passed")
UNCLEAR = reported(
    status="unclear",
    diagnosis="no display here",
    options=["use Xvfb"],
    recommendation="use Xvfb",
)
BROKEN = reported(status="failed", diagnosis="the port is wrong", fixable=False)
GATES_ONLY = "## E2E Test\n\n**Verify:** `check`"
ALWAYS = [1] * 99


def broken(diagnosis: str, fix_plan: str = "mend it") -> ko.AgentResult:
    return reported(
        status="failed", diagnosis=diagnosis, fixable=True, fix_plan=fix_plan
    )


def world(
    *outcomes: Outcome,
    e2e: ko.Task | None = None,
    task_gates: tuple[str, ...] = (),
    terminal: FakeTerminal | None = None,
    sandbox: FakeSandbox | None = None,
    **config: Any,
) -> World:
    """One task that is completed, then the scenario comes to these outcomes."""
    config = {"e2e_retries": 0, **config}
    return World(
        plan(task(gates=task_gates), e2e=e2e or scenario()),
        completed(),
        *outcomes,
        config=ko.Config(**config),
        terminal=terminal,
        sandbox=sandbox,
    )


def prompts(a_world: World) -> list[str]:
    return [
        call.prompt.splitlines()[0].split(" of milestone")[0]
        for call in a_world.agent.calls
    ]


def code(a_world: World) -> ko.ExitCode:
    return ko.exit_code(a_world.plan, a_world.state())


def test_a_scenario_leaves_no_trace_in_the_workspace() -> None:
    a = world(PASSED)
    assert a.run().record("e2e").status is Status.COMPLETED
    assert a.sandbox.work == {"work 1"} and code(a) is ko.ExitCode.OK


def test_a_scenario_of_gates_alone_takes_no_call_when_they_pass() -> None:
    a = world(e2e=scenario(text=GATES_ONLY, gates=("check",)))
    record = a.run().record("e2e")
    assert (record.status, record.started, len(a.agent.calls)) == (
        Status.COMPLETED,
        1,
        1,
    )
    assert [(e["task"], e.get("kind"), e["status"]) for e in a.ledger.calls] == [
        ("1.1", None, "completed"),
        ("e2e", "gate", "completed"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "## E2E Test\n\nLook at the page.\n\n**Verify:** `check`",
        "## E2E Test\n\n```bash\nrun me\n```\n\n**Verify:** `check`",
    ],
)
def test_a_scenario_that_says_more_than_its_gates_is_carried_out(text: str) -> None:
    a = world(PASSED, e2e=scenario(text=text, gates=("check",)))
    a.run()
    assert len(a.agent.calls) == 2


def test_a_session_that_says_passed_though_a_gate_fails_is_not_believed() -> None:
    a = world(PASSED, e2e=scenario(gates=("check",)), sandbox=FakeSandbox(check=ALWAYS))
    record = a.run().record("e2e")
    assert code(a) is ko.ExitCode.NEEDS_HUMAN
    assert record.attempts[-1].status == "failed"
    assert "gate says no" in record.attempts[-1].evidence


def test_a_gate_that_fails_once_makes_the_scenario_flaky_not_failed() -> None:
    a = world(
        e2e=scenario(text=GATES_ONLY, gates=("check",)),
        sandbox=FakeSandbox(check=[1]),
        e2e_retries=1,
    )
    record = a.run().record("e2e")
    assert record.status is Status.COMPLETED
    assert record.reason == "flaky: failed 1 of 2 runs" and len(a.agent.calls) == 1


def test_a_scenario_that_passes_when_it_is_run_again_is_flaky() -> None:
    a = world(broken("it hung"), PASSED, e2e_retries=1)
    assert a.run().record("e2e").reason == "flaky: failed 1 of 2 runs"
    assert code(a) is ko.ExitCode.OK


@pytest.mark.parametrize(
    ("flaky", "at_least", "at_most"), [(0.0, 0, 0), (0.2, 100, 220)]
)
def test_flaky_scenarios_are_told_apart_in_the_expected_share(
    flaky: float,
    at_least: int,
    at_most: int,
) -> None:
    dice, words = random.Random(7), []
    for _ in range(1000):
        codes = [int(dice.random() < flaky) for _ in range(9)]
        a = world(
            *[PASSED] * 2,
            e2e=scenario(text=GATES_ONLY, gates=("check",)),
            sandbox=FakeSandbox(check=codes),
            e2e_retries=1,
        )
        record = a.run().record("e2e")
        words.append(record.reason.partition(":")[0] or record.status.value)
    assert at_least <= words.count("flaky") <= at_most  # expected: 160
    assert words.count("needs_human") <= 70 * bool(flaky)  # expected: 40
    assert words.count("failed") == 0


def test_a_failure_that_can_be_fixed_is_fixed_and_the_scenario_run_again() -> None:
    a = world(broken("98.6 is 99"), completed(), PASSED)
    state = a.run()
    assert prompts(a) == [
        "Task 1.1",
        "E2E scenario",
        "Task e2e-fix-1",
        "E2E scenario",
    ]
    fix = a.agent.calls[2].prompt
    assert "98.6 is 99" in fix and "mend it" in fix and "E2E fix 1" in fix
    assert (code(a), state.fixes["e2e-fix-1"].checkpoint) == (
        ko.ExitCode.OK,
        state.head,
    )
    assert a.sandbox.log(state.head) == [
        "Task e2e-fix-1: E2E fix 1",
        "Task 1.1: Title 1.1",
    ]
    assert a.sandbox.work == {"work 1", "work 3"}


def test_a_fix_that_breaks_a_tasks_gate_is_taken_back_and_the_next_one_is_told() -> (
    None
):
    a = world(
        broken("no"),
        completed(),
        completed(),
        PASSED,
        task_gates=("unit",),
        sandbox=FakeSandbox(unit=[0, 0, 1, 0, 0]),
    )
    state = a.run()
    assert [fix.status for fix in state.fixes.values()] == [
        Status.FAILED,
        Status.COMPLETED,
    ]
    assert "E2E fix 1 was taken back: gate `unit`: exit 1" in a.agent.calls[3].prompt
    assert a.sandbox.work == {"work 1", "work 4"} and code(a) is ko.ExitCode.OK
    assert ko.status_json(state, a.plan, False)["status"] == "completed"


def test_a_fix_that_was_taken_back_leaves_the_milestone_open() -> None:
    a = world(broken("no"), failed(), broken("other words here"), Crash())
    with pytest.raises(Crash):
        a.run()
    assert ko.status_json(a.state(), a.plan, False)["status"] == "interrupted"


def test_fixes_are_limited() -> None:
    words = ("alpha", "beta two", "gamma x y", "delta 1 b c")
    a = world(
        *[x for w in words for x in (broken(f"{w} {w} {w}"), completed())], max_fixes=3
    )
    record = a.run().record("e2e")
    assert record.reason.startswith("it fails after 3 fixes, limit 3")
    assert len(a.state().fixes) == 3 and code(a) is ko.ExitCode.FAILED
    a.run()
    assert len(a.agent.calls) == 8  # nothing was called again


@pytest.mark.parametrize(
    "diagnoses",
    [
        ["port 80 is closed", "port 81 is closed"],
        ["port 80 is closed", "the login page has no button", "port 80 is closed"],
    ],
)
def test_fixes_that_go_in_a_circle_stop_early(diagnoses: list[str]) -> None:
    a = world(*[x for d in diagnoses for x in (broken(d), completed())])
    reason = a.run().record("e2e").reason
    assert reason.startswith("the same diagnosis again after ")
    assert len(a.state().fixes) == len(diagnoses) - 1


def test_what_cannot_be_fixed_is_a_question_with_ways_out() -> None:
    a = world(BROKEN)
    asked = a.run().record("e2e").question
    assert asked and asked.text == "the port is wrong"
    assert asked.options == ko.BY_HAND
    assert waiting(a.state()) == ["e2e"] and a.notifier.news == []


def test_an_unclear_scenario_offers_what_the_session_offered() -> None:
    asked = (a := world(UNCLEAR)).run().record("e2e").question
    assert asked and asked.options[0] == asked.recommendation == "use Xvfb"
    assert code(a) is ko.ExitCode.NEEDS_HUMAN


@pytest.mark.parametrize("answer", ko.BY_HAND)
def test_a_person_may_settle_a_scenario(answer: str) -> None:
    a = world(UNCLEAR)
    a.run()
    record = a.run(answer=answer).record("e2e")
    assert (record.status, record.reason) == (
        Status.COMPLETED,
        f"a person said: {answer}",
    )


def test_a_persons_other_words_guide_a_fix() -> None:
    a = world(UNCLEAR, completed(), PASSED)
    a.run()
    assert a.run(answer="start Xvfb first").record("e2e").status is Status.COMPLETED
    assert (
        "Fix: start Xvfb first" in a.agent.calls[2].prompt and len(a.agent.calls) == 4
    )


def test_an_outage_that_a_person_cured_leads_to_another_run_not_to_a_fix() -> None:
    a = world(broken("it hung"), logged_out(), PASSED, e2e_retries=1)
    a.run()
    assert waiting(a.state()) == ["e2e"]
    assert a.run(answer=ko.CURED).record("e2e").reason == "flaky: failed 1 of 2 runs"
    assert len(a.agent.calls) == 4 and not a.state().fixes


def test_a_person_at_the_terminal_sees_the_fix_and_agrees_to_it() -> None:
    a = world(broken("no"), completed(), PASSED, terminal=FakeTerminal("\n"))
    a.run()
    assert a.terminal.prompts == ["Apply fix? [Y/n] "] and code(a) is ko.ExitCode.OK
    assert "E2E failed: no" in a.told.getvalue() and "Fix: mend it" in a.told.getvalue()


def test_a_fix_that_a_person_declines_becomes_a_question() -> None:
    a = world(broken("no"), terminal=FakeTerminal("n\n", f"{ko.BY_HAND[0]}\n"))
    assert a.run().record("e2e").reason == f"a person said: {ko.BY_HAND[0]}"
    a = world(broken("no"), terminal=FakeTerminal("n\n", "later\n"))
    a.run()
    assert code(a) is ko.ExitCode.NEEDS_HUMAN and not a.state().fixes


def test_a_question_of_a_fix_is_parked_and_its_answer_goes_on_with_it() -> None:
    a = world(broken("no"), asks(), completed(), PASSED)
    a.run()
    assert waiting(a.state()) == ["e2e-fix-1"] and code(a) is ko.ExitCode.NEEDS_HUMAN
    a.run(answer="red")
    assert a.agent.calls[3].session_id == "s-1" and code(a) is ko.ExitCode.OK
    assert len(a.state().fixes) == 1


def test_a_task_whose_gate_a_later_one_broke_is_named_with_it() -> None:
    sandbox = FakeSandbox(one=[0, 1, 1, 1, 0])   # when done, at the end, at each commit
    a = World(
        plan(task("1.1", gates=("one",)), task("1.2"), task("1.3"), e2e=scenario()),
        *[completed()] * 3,
        broken("no"),
        completed(),
        PASSED,
        sandbox=sandbox,
        config=ko.Config(e2e_retries=0),
    )
    a.run()
    assert (
        "first broken by task 1.2: task 1.1's gate `one`"
        in a.agent.calls[3].prompt
    )
    assert [c for c in sandbox.calls if c.startswith("visit")] == [
        "visit c3",
        "visit c2",
        "visit c1",
        "visit orchestrator/m",
    ]
    assert code(a) is ko.ExitCode.OK


def test_bisect_names_the_task_that_broke_the_scenarios_gate() -> None:
    a = World(
        plan(task("1.1"), task("1.2"), e2e=scenario(gates=("check",))),
        *[completed()] * 2,
        BROKEN,
        sandbox=FakeSandbox(check=[1, 1, 0]),
        config=ko.Config(e2e_retries=0, e2e_bisect="yes"),
    )
    evidence = a.run().record("e2e").attempts[-1].evidence
    assert evidence.startswith(
        "first broken by task 1.2: task e2e's gate `check`: exit 1"
    )


def test_a_gate_that_failed_before_its_feature_was_there_is_bisected_too() -> None:
    tasks = [task(f"1.{n}") for n in range(1, 6)]
    a = World(
        plan(*tasks, e2e=scenario(gates=("check",))),
        *[completed()] * 5,
        BROKEN,
        sandbox=FakeSandbox(check=[1, 1, 1, 0, 1, 1]),      # 1.5, 1.4 fail, 1.3 passes
        config=ko.Config(e2e_retries=0, e2e_bisect="yes"),
    )
    evidence = a.run().record("e2e").attempts[-1].evidence
    assert evidence.startswith("first broken by task 1.4: ")


def test_a_killed_scenario_is_counted_and_starts_clean() -> None:
    a = world(Crash(), BROKEN)
    with pytest.raises(Crash):
        a.run()
    a.agent.before = lambda _: a.sandbox.dirty and pytest.fail("not clean")
    assert a.run().record("e2e").started == 2


def test_a_scenario_that_always_kills_the_program_is_given_up() -> None:
    a = world(*[Crash()] * 9)
    for _ in range(3):
        with pytest.raises(Crash):
            a.run()
    assert "3 runs were cut short" in a.run().record("e2e").reason


def test_the_scenario_and_its_fixes_are_under_the_money_limit_too() -> None:
    assert "money limit" in world(max_cost_usd=0.2).run().record("e2e").reason
    a = world(broken("no"), max_cost_usd=0.5)
    assert "money limit" in a.run().record("e2e").reason and not a.state().fixes


def test_a_task_that_is_done_again_has_the_scenario_run_again() -> None:
    a = world(PASSED, completed(), PASSED)
    a.run()
    a.run_one(a.plan.tasks[0])
    a.run()
    assert code(a) is ko.ExitCode.OK and len(a.agent.calls) == 4


@settings(max_examples=120, deadline=None)
@given(
    crashes=st.frozensets(st.integers(1, 40), max_size=6),
    after=st.frozensets(st.integers(1, 40), max_size=4),
)
def test_killed_between_any_two_steps_the_fix_cycle_goes_on_with_its_counts(
    crashes: frozenset[int],
    after: frozenset[int],
) -> None:
    """The session mends the second of two faults at its second fix."""
    a = World(
        plan(task(gates=("unit",)), e2e=scenario()),
        config=ko.Config(e2e_retries=0, max_attempts=20, max_fixes=20),
    )
    assert isinstance(a.store, MemoryStore)
    a.store.crash_at, a.store.crash_after = crashes, after

    def answer(call: Any) -> None:
        first = call.prompt.splitlines()[0]
        mended = sum("E2E fix" in text for text in a.sandbox.log(a.sandbox.head))
        faults = [broken("alpha beta gamma"), broken("one two three four"), PASSED]
        a.agent.outcomes = [
            faults[min(mended, 2)] if first.startswith("E2E") else completed()
        ]

    a.agent.before = answer
    for _ in range(20):
        try:
            a.run()
            break
        except Crash:
            continue
    state = a.state()
    assert code(a) is ko.ExitCode.OK
    log = [text for text in a.sandbox.log(state.head) if "E2E fix" in text]
    assert len(log) == 2
    done = [fix for fix in state.fixes.values() if fix.status is Status.COMPLETED]
    assert len(done) == 2 and len(state.fixes) <= 2 + len(crashes | after)


OUTCOMES: dict[str, Outcome] = {
    "passed": PASSED,
    "broken": broken("alpha"),
    "other": broken("one two three"),
    "unfixable": BROKEN,
    "unclear": UNCLEAR,
    "completed": completed(),
    "failed": failed(),
    "asks": asks(),
    "crash": Crash(),
    "outage": overloaded(),
    "silent": ko.AgentResult(ended=ko.Ended.IDLE),
}
FREE = ("outage", "asks")


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(st.sampled_from([*OUTCOMES]), max_size=40),
    crashes=st.frozensets(st.integers(1, 80), max_size=8),
    retries=st.integers(0, 2),
)
def test_no_sequence_of_outcomes_crashes_and_answers_exceeds_a_limit(
    names: list[str],
    crashes: frozenset[int],
    retries: int,
) -> None:
    a = World(
        plan(e2e=scenario()),
        config=ko.Config(
            max_attempts=2, max_fixes=2, e2e_retries=retries, outage_delays_s=(1.0,)
        ),
    )
    assert isinstance(a.store, MemoryStore)
    a.store.crash_at = crashes
    a.agent.outcomes = [completed(), *(OUTCOMES[name] for name in names)]
    for answer in ["", "guide it"] * 30:
        try:
            a.run(answer=answer)
        except (Crash, ko.OutageError):
            continue
        except IndexError:  # no outcome is left
            break
        if not waiting(a.state()):
            break
    state, called = a.state(), a.agent.calls
    runs = sum(c.prompt.startswith("E2E") for c in called)
    outages = sum(e["status"] == "outage" for e in a.ledger.lines if "status" in e)
    assert len(state.fixes) <= 2
    assert runs <= (1 + retries) * 3 + 2 + outages
    for fix in state.fixes.values():
        assert fix.started <= 1 + ko.MAX_QUESTIONS


# What a refactoring had lost.

def test_a_persons_old_word_does_not_settle_a_new_run_of_the_scenario() -> None:
    a_world = world(BROKEN, BROKEN)
    a_world.run()
    a_world.run(answer=ko.BY_HAND[1])
    again = a_world.run_one(a_world.plan.e2e)
    assert again.record(ko.E2E_ID).status is ko.TaskStatus.NEEDS_HUMAN
    assert code(a_world) is ko.ExitCode.NEEDS_HUMAN


def test_nor_that_of_what_a_task_added_since_has_broken() -> None:
    unclear = reported(status="failed", diagnosis="nobody is there", fixable=False)
    a_world = world(BROKEN, completed(), unclear)
    a_world.run()
    a_world.plan = plan(task(), task("1.2"), e2e=a_world.plan.e2e)
    after = a_world.run(answer=ko.BY_HAND[1])
    assert after.record(ko.E2E_ID).status is ko.TaskStatus.NEEDS_HUMAN


def test_an_edited_tasks_gate_is_run_though_the_commit_was_tried_before() -> None:
    a_world = world(broken("it hung"), ctrl_c(), PASSED, e2e_retries=1,
                    sandbox=FakeSandbox(unit=ALWAYS))
    with pytest.raises(ko.Interrupted):
        a_world.run()
    edited = dataclasses.replace(task(), text="edited", gates=("unit",))
    a_world.plan = plan(edited, e2e=a_world.plan.e2e)
    a_world.run()
    assert "gate unit" in a_world.sandbox.calls and code(a_world) is not ko.ExitCode.OK
