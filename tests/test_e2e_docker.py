"""E2E with the real CLI in Docker: proved, fixed, killed; and a plan about us."""
from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import AgentBox, agent_box, wait_until
from conftest import ROOT, TEST_PLANS, missing
from program import Screen
from test_e2e_program import Hub, git, was_pushed

pytestmark = [pytest.mark.docker, pytest.mark.slow]
GREETER = TEST_PLANS / "e2e_will_pass.md"
CONVERTER = TEST_PLANS / "e2e_will_fail_fixable.md"
TASKS = ["One", "Task 1.1", "Task 1.2"]


@pytest.fixture(scope="module")
def box(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[AgentBox]:
    with agent_box(tmp_path_factory.mktemp("e2e"), "ktrdr-e2e") as made:
        yield made


def is_done(box: AgentBox, plan: Path, *last: str) -> None:
    """The branch has the tasks and what came last; nothing of the agent is alive."""
    state = box.program.state(plan.stem)
    assert state["e2e_status"] == "completed"
    subjects = box.inside("git log --reverse --format=%s").splitlines()
    assert [s.partition(":")[0] for s in subjects] == [*TASKS, *last]
    assert box.inside("git rev-parse HEAD; git symbolic-ref --short HEAD").split() == [
        state["head"], state["branch"]]
    assert box.inside("git status --porcelain") == "" and box.running() == []


def test_a_milestone_that_works_is_proved_and_becomes_a_pull_request(
    box: AgentBox, tmp_path: Path,
) -> None:
    hub = Hub(box.program, tmp_path)
    done = box.program.run("run", GREETER, "--create-pr", timeout_s=300)
    git(box.program.cwd, "remote", "remove", "origin")   # nobody else is to be asked
    assert done.returncode == 0, done.stderr
    assert "pull/1" in done.stdout and was_pushed(box.program, hub, GREETER.stem)
    is_done(box, GREETER)
    run, = box.program.state(GREETER.stem)["task_results"]["e2e"]["attempts"]
    assert (run["status"], run["rule"]) == ("completed", "structured")
    assert run["cost_usd"] > 0


def test_a_milestone_that_fails_is_fixed_and_proved_unattended(box: AgentBox) -> None:
    done = box.program.run("run", CONVERTER, "--fresh", timeout_s=300)
    assert done.returncode == 0, done.stderr
    is_done(box, CONVERTER, "Task e2e-fix-1")
    assert "Fix: In converter/temperature.py divide with /" in done.stderr
    assert box.inside("python3 -B -m converter 38.5") == "101.3"


def test_at_a_terminal_the_fix_is_applied_when_a_person_agrees(box: AgentBox) -> None:
    with Screen(box.program, "run", CONVERTER, "--fresh") as screen:
        screen.until("Apply fix? [Y/n] ", timeout_s=300)
        assert "37 degrees give 98.0" in screen.text
        screen.type("\n")
        assert screen.end(timeout_s=300) == 0, screen.text
    is_done(box, CONVERTER, "Task e2e-fix-1")


def test_a_run_that_is_killed_in_the_fix_session_goes_on_with_its_counts(
    box: AgentBox,
) -> None:
    box.program.kill_at(r"  e2e-fix-1  Edit ", "run", CONVERTER, "--fresh",
                        timeout_s=300)
    wait_until(lambda: not box.running(), timeout_s=15)
    done = box.program.run("run", CONVERTER, timeout_s=300)
    assert done.returncode == 0, done.stderr
    is_done(box, CONVERTER, "Task e2e-fix-2")
    state = box.program.state(CONVERTER.stem)
    assert state["task_results"]["e2e-fix-1"]["reason"].startswith("failed 1 times")
    assert state["task_attempt_counts"]["e2e"] == 3


def test_the_orchestrator_improves_itself(docker_engine: str, tmp_path: Path) -> None:
    """On a clone of this repository; its gates run what came of it in the sandbox."""
    ours, plan = tmp_path / "ours", TEST_PLANS / "orchestrator_enhancements.md"
    if subprocess.run(["git", "clone", "-q", str(ROOT), str(ours)],
                      check=False).returncode:
        missing(f"{ROOT} is no git repository")
    with agent_box(ours, "ktrdr-meta") as box:
        done = box.program.run("run", plan, timeout_s=300)
        assert done.returncode == 0, done.stderr
        state = box.program.state(plan.stem)
        assert state["completed_tasks"] == ["1.1", "1.2", "e2e-fix-1"]
        assert state["e2e_status"] == "completed" and state["findings"] == []
        assert box.program.run("fetch", plan).returncode == 0
    made = git(ours, "diff", "--name-only", "HEAD", f"orchestrator/{plan.stem}")
    assert made.split() == ["deploy/completion.py", "tests/test_completion.py"]
