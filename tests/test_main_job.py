"""The main job as a user runs it: local sandbox, scripted agent, whatever happens."""
from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TEST_PLANS
from program import LOCAL, Program

pytestmark = pytest.mark.contract
THREE = TEST_PLANS / "three_tasks_clean.md"
HELLO = TEST_PLANS / "hello_world.md"
DONE = [{"write": "hello/hello.py", "content": "print('Hello, World!')\n"},
        {"report": {"status": "completed", "summary": "done"}}]


@pytest.fixture
def program(repository: Path) -> Program:
    return Program(repository)


def wait_for(program: Program, calls: int, timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while len(program.calls()) < calls:
        assert time.monotonic() < until, "the agent was not called"
        time.sleep(0.01)


def is_gone(program: Program, within_s: float = 3) -> bool:
    until = time.monotonic() + within_s
    while program.alive() and time.monotonic() < until:
        time.sleep(0.02)
    return not program.alive()


@pytest.mark.parametrize("name", ["hello_world", "health_check", "three_tasks_clean"])
def test_a_plan_runs_to_the_end_a_commit_a_task(program: Program, name: str) -> None:
    done = program.run("run", TEST_PLANS / f"{name}.md", *LOCAL)
    assert done.returncode == 0, done.stderr
    state = program.state(name)
    tasks = state["completed_tasks"]
    assert len(tasks) == {"hello_world": 1}.get(name, 3)
    subjects = program.git(name, "log", "--reverse", "--format=%s").splitlines()
    assert [s.split(":")[0] for s in subjects] == ["One", *(f"Task {t}" for t in tasks)]
    assert program.git(name, "rev-parse", "HEAD") == state["head"]
    assert program.git(name, "status", "--porcelain") == ""
    assert "completed" in done.stdout and not program.alive()
    assert subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=program.cwd,
                          capture_output=True, check=True).stdout == b""


def test_progress_goes_to_stderr_a_line_for_each_tool_call(program: Program) -> None:
    done = program.run("run", HELLO, *LOCAL)
    assert "Write" in done.stderr and "Bash python3 hello/hello.py" in done.stderr
    assert "Write" not in done.stdout and "$0.03" in done.stdout


def test_a_completed_milestone_is_a_quick_success(program: Program) -> None:
    program.run("run", HELLO, *LOCAL)
    again = program.run("run", HELLO, *LOCAL)
    assert again.returncode == 0 and len(program.calls()) == 1
    assert "is completed" in again.stderr


def test_fresh_archives_what_was_there_and_starts_over(program: Program) -> None:
    program.run("run", HELLO, *LOCAL)
    again = program.run("run", HELLO, *LOCAL, "--fresh")
    assert again.returncode == 0 and len(program.calls()) == 2
    archived = list((program.cwd / "state/archive").glob("*/hello_world_state.json"))
    assert len(archived) == 1


def test_a_failing_gate_outranks_the_agents_word(program: Program) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [
        [{"report": {"status": "completed", "summary": "believe me"}}], DONE]}})
    done = program.run("run", HELLO, *LOCAL)
    assert done.returncode == 0 and len(program.calls()) == 2
    attempts = program.state("hello_world")["task_results"]["1.1"]["attempts"]
    assert [(a["status"], a["rule"]) for a in attempts] == [
        ("failed", "gate"), ("completed", "structured")]


def test_a_retry_starts_from_the_checkpoint_and_is_told_what_failed(
    program: Program,
) -> None:
    failed = [{"write": "junk.txt", "content": "junk"},
              {"report": {"status": "failed", "summary": "no",
                          "error": "E-4711 broke"}}]
    program.scenarios({"hello_world/1.1": {"attempts": [failed, DONE]}})
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert not (program.workspace("hello_world") / "junk.txt").exists()
    kept = program.git("hello_world", "show",
                       "refs/orchestrator/hello_world/rejected/1.1-1:junk.txt")
    assert kept == "junk"


def test_an_outage_is_waited_out_and_not_charged(program: Program) -> None:
    outage = {"api_error": {"status": 529, "error": "overloaded"}, "times": 2}
    program.scenarios({"hello_world/1.1": {"attempts": [[outage, *DONE]]}})
    done = program.run("run", HELLO, *LOCAL, "--outage-delays", "0.1,0.1,0.1")
    assert done.returncode == 0, done.stderr
    assert program.state("hello_world")["task_attempt_counts"] == {"1.1": 1}


def test_an_outage_that_lasts_exits_with_try_later_and_goes_on_later(
    program: Program,
) -> None:
    outage = {"api_error": {"status": 529, "error": "overloaded"}}
    program.scenarios({"hello_world/1.1": {"attempts": [[outage]]}})
    done = program.run("run", HELLO, *LOCAL, "--outage-delays", "0.1")
    assert done.returncode == 75 and len(program.calls()) == 2
    assert program.state("hello_world")["task_attempt_counts"] == {"1.1": 0}
    program.scenarios({"hello_world/1.1": {"attempts": [DONE]}})
    assert program.run("resume", HELLO, *LOCAL).returncode == 0


def test_money_is_limited_for_the_milestone(program: Program) -> None:
    done = program.run("run", THREE, *LOCAL, "--max-cost-usd", "0.04")
    assert done.returncode == 1 and "money limit" in done.stdout
    assert "--max-budget-usd" in program.calls()[0]["argv"]


def test_a_silent_agent_is_stopped_by_the_idle_deadline_within_five_seconds(
    program: Program,
) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[
        {"ignore_term": True}, {"daemon": "sleep 600"}, {"say": "now"},
        {"hang": True}]]}})
    begun = time.monotonic()
    done = program.run("run", HELLO, *LOCAL, "--idle-timeout", "1",
                       "--max-attempts", "1")
    assert done.returncode == 1 and time.monotonic() - begun < 1 + 5
    assert program.state("hello_world")["task_results"]["1.1"]["attempts"][0][
        "ended"] == "idle"
    assert not program.alive()


@pytest.mark.parametrize("step", [
    {"stderr_kb": 300}, {"raw_mb_line": 50}, {"bad_utf8": True},
    {"raw": '{"type": "result", "trunc\n'}, {"raw": "\x00\x01 not json\n"}],
    ids=lambda step: str(next(iter(step))))
def test_what_no_cli_should_print_is_survived_and_kept(
    program: Program, step: dict[str, object],
) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[step, *DONE]]}})
    done = program.run("run", HELLO, *LOCAL)
    assert done.returncode == 0, done.stderr
    transcript = program.cwd / "state/hello_world/1.1-1.ndjson"
    if "stderr_kb" in step:
        assert transcript.with_suffix(".stderr").stat().st_size >= 300_000
    if "raw_mb_line" in step:
        assert transcript.stat().st_size >= 50_000_000


@pytest.mark.slow
def test_a_hang_after_the_result_costs_only_the_grace(program: Program) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[*DONE, {"hang": True}]]}})
    begun = time.monotonic()
    done = program.run("run", HELLO, *LOCAL)
    assert done.returncode == 0 and 10 <= time.monotonic() - begun < 16
    attempt = program.state("hello_world")["task_results"]["1.1"]["attempts"][0]
    assert (attempt["ended"], attempt["status"]) == ("grace", "completed")


@pytest.mark.parametrize("death", [{"die": 3}, {"kill": 9}, {"kill": 11}], ids=str)
def test_an_agent_that_dies_has_failed_its_attempt(
    program: Program, death: dict[str, int],
) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[{"say": "hm"}, death], DONE]}})
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    attempts = program.state("hello_world")["task_results"]["1.1"]["attempts"]
    assert [a["status"] for a in attempts] == ["failed", "completed"]


def test_a_parked_question_does_not_keep_another_task_from_being_run(
    program: Program,
) -> None:
    plan = program.cwd / "two.md"
    plan.write_text("# Two\n\n## Task 1.1: One\n\nOne.\n\n## Task 1.2: Two\n\nTwo.\n")
    program.scenarios({"two/1.1": {"attempts": [[
        {"report": {"status": "needs_human", "summary": "?", "question": "Which?"}}]]},
        "two/1.2": {"attempts": [DONE]}})
    assert program.run("run", plan, *LOCAL).returncode == 3
    assert program.run("task", plan, "1.2", *LOCAL).returncode == 0
    again = program.run("run", plan, *LOCAL)
    assert again.returncode == 3 and "task 1.1 asks: Which?" in again.stderr
    assert program.state("two")["completed_tasks"] == ["1.2"]


def test_a_question_further_down_does_not_keep_what_comes_first_from_being_done(
    program: Program,
) -> None:
    plan = program.cwd / "two.md"
    plan.write_text("# Two\n\n## Task 1.1: One\n\nOne.\n\n## Task 1.2: Two\n\nTwo.\n")
    program.scenarios({"two/1.1": {"attempts": [DONE]}, "two/1.2": {"attempts": [[
        {"report": {"status": "needs_human", "summary": "?", "question": "Which?"}}]]}})
    assert program.run("task", plan, "1.2", *LOCAL).returncode == 3
    assert program.run("run", plan, *LOCAL).returncode == 3
    assert program.state("two")["completed_tasks"] == ["1.1"]


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_it_quickly_and_leaves_nothing(
    program: Program, number: signal.Signals, status: int,
) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[
        {"daemon": "sleep 600"}, {"sleep": 60}]]}})
    started = program.start("run", HELLO, *LOCAL)
    wait_for(program, 1)
    time.sleep(0.3)
    begun = time.monotonic()
    started.send_signal(number)
    _, err = started.communicate(timeout=10)
    assert started.returncode == status and "interrupted" in err
    assert time.monotonic() - begun < 1.5
    assert not program.alive()
    assert (program.cwd / "state/hello_world.lock").read_text() == ""
    program.scenarios({"hello_world/1.1": {"attempts": [DONE]}})
    assert program.run("resume", HELLO, *LOCAL).returncode == 0


def test_a_second_interrupt_ends_it_at_once_and_still_leaves_nothing(
    program: Program,
) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[
        {"ignore_term": True}, {"daemon": "sleep 600"}, {"hang": True}]]}})
    started = program.start("run", HELLO, *LOCAL)
    wait_for(program, 1)
    time.sleep(0.3)
    begun = time.monotonic()
    for _ in range(2):
        started.send_signal(signal.SIGINT)
        time.sleep(0.3)
    started.communicate(timeout=10)
    assert started.returncode == 130 and time.monotonic() - begun < 2
    assert is_gone(program)


def test_a_killed_run_takes_its_agent_along(program: Program) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[
        {"ignore_term": True}, {"daemon": "sleep 600"}, {"hang": True}]]}})
    started = program.start("run", HELLO, *LOCAL)
    wait_for(program, 1)
    time.sleep(0.3)
    assert program.alive()
    started.kill()
    started.communicate()
    assert is_gone(program)


@pytest.mark.slow
def test_fifty_simultaneous_starts_are_one_run(program: Program) -> None:
    program.scenarios({"hello_world/1.1": {"attempts": [[{"sleep": 12}, *DONE]]}})
    crowd = [program.start("run", HELLO, *LOCAL) for _ in range(50)]
    statuses = []
    for started in crowd:
        started.communicate(timeout=120)
        statuses.append(started.returncode)
    assert sorted(statuses) == [0] + [4] * 49
    assert len(program.calls()) == 1


def kill_and_resume(program: Program, after_s: float) -> None:
    """One run of three tasks, killed once, then resumed, and all that must hold."""
    started = program.start("run", THREE, *LOCAL)
    time.sleep(after_s)
    started.kill()
    started.communicate()
    path = program.cwd / "state/three_tasks_clean_state.json"
    if path.exists():
        json.loads(path.read_text())
    done = program.run("run", THREE, *LOCAL)
    assert done.returncode == 0, done.stderr
    state = program.state("three_tasks_clean")
    assert state["completed_tasks"] == ["1.1", "1.2", "1.3"]
    subjects = program.git("three_tasks_clean", "log", "--format=%s").splitlines()
    assert len(subjects) == len(set(subjects)) == 4
    assert max(state["task_attempt_counts"].values()) <= 2
    assert is_gone(program)


@pytest.mark.slow
def test_a_run_killed_at_any_instant_is_finished_by_the_next(tmp_path: Path) -> None:
    kill_at_random_instants(tmp_path, 4)


@pytest.mark.slow
def test_a_hundred_runs_killed_at_random_instants_are_all_finished(
    tmp_path: Path,
) -> None:
    kill_at_random_instants(tmp_path, 100)


def kill_at_random_instants(tmp_path: Path, rounds: int) -> None:
    git = ("git", "-c", "user.name=S", "-c", "user.email=s@localhost")
    chance = random.Random(20261123)
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run([*git, "init", "-q", "-b", "main"], cwd=folder, check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "One"], cwd=folder,
                       check=True)
        kill_and_resume(Program(folder), chance.uniform(0.05, 1.2))
