"""The real CLI in the real Docker sandbox, against the scripted Messages API."""
from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import (
    AgentBox,
    agent_box,
    docker_box,
    make_repository,
    require_image,
    wait_until,
)
from conftest import TEST_PLANS

import ktrdr_orchestrator as ko

pytestmark = [pytest.mark.docker]


@pytest.fixture(scope="module")
def box(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[AgentBox]:
    with agent_box(tmp_path_factory.mktemp("docker"), "ktrdr-test") as made:
        yield made


@pytest.fixture(autouse=True)
def no_run_is_left(box: AgentBox) -> Iterator[None]:
    yield
    box.end_runs()


def test_init_clones_the_host_repository_and_keeps_it_the_second_time(
    box: AgentBox,
) -> None:
    again = box.program.run("sandbox", "init", timeout_s=300)
    assert again.returncode == 0 and "kept" in again.stdout
    assert "2.1.330" in again.stdout
    assert box.inside("git log --format=%s main") == "One"
    assert box.inside("git remote") == ""


@pytest.mark.parametrize(("name", "files"), [
    ("hello_world", "hello/hello.py"),
    pytest.param("health_check", "health/telemetry.py", marks=pytest.mark.slow),
    pytest.param("three_tasks_clean", "", marks=pytest.mark.slow)])
def test_a_plan_runs_to_completion_with_the_real_cli(
    box: AgentBox, name: str, files: str,
) -> None:
    done = box.program.run("run", TEST_PLANS / f"{name}.md", timeout_s=300)
    assert done.returncode == 0, done.stderr
    state = box.program.state(name)
    tasks = state["completed_tasks"]
    assert len(tasks) == {"hello_world": 1}.get(name, 3)
    assert box.inside(f"test -e /workspace/{files} && echo there") == "there"
    subjects = box.inside("git log --reverse --format=%s").splitlines()
    assert [s.split(":")[0] for s in subjects] == ["One", *(f"Task {t}" for t in tasks)]
    assert box.inside("git rev-parse HEAD") == state["head"]
    assert all(a["cost_usd"] > 0 for r in state["task_results"].values()
               for a in r["attempts"])
    assert box.running() == []


def test_the_branch_is_fetched_into_the_host_repository(box: AgentBox) -> None:
    plan = TEST_PLANS / "hello_world.md"
    box.program.run("run", plan, timeout_s=300)
    done = box.program.run("fetch", plan)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(["git", "show", "orchestrator/hello_world:hello/hello.py"],
                           cwd=box.program.cwd, capture_output=True, text=True,
                           check=True)
    assert "Hello" in shown.stdout


@pytest.mark.slow
def test_a_killed_run_takes_its_agent_in_the_sandbox_along(
    box: AgentBox, tmp_path: Path,
) -> None:
    started = box.hanging_run(tmp_path)
    started.kill()
    started.communicate(timeout=30)
    wait_until(lambda: not box.running(), timeout_s=15)


def test_reset_clears_the_workspace_and_keeps_models(box: AgentBox) -> None:
    box.inside("touch /workspace/junk /env/logs/x /env/models/m && mkdir /workspace/d")
    done = box.program.run("sandbox", "reset", "--json")
    assert done.returncode == 0, done.stderr
    assert box.inside("ls /workspace /env/logs /env/models | grep -v : | xargs") == \
        "m README.md"
    assert box.inside("git symbolic-ref --short HEAD") == "main"


@pytest.mark.slow
def test_a_sandbox_that_was_stopped_is_started_by_the_next_run(box: AgentBox) -> None:
    box.compose("stop", "-t", "0")
    plan = TEST_PLANS / "three_tasks_clean.md"
    done = box.program.run("run", plan, "--fresh", timeout_s=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def old_image(box: AgentBox) -> Iterator[str]:
    """The sandbox image as it was before a script of ours was added."""
    name = f"{require_image(box.program.environ)}-old"
    subprocess.run(["docker", "build", "-q", "-t", name, "-"], check=True, text=True,
                   capture_output=True, input=f"FROM {name.removesuffix('-old')}\n"
                   f"USER root\nRUN rm {ko.INSIDE}/end-all.sh\n")
    yield name
    box.docker("rmi", name)


@pytest.mark.slow
def test_an_image_that_is_older_than_the_program_is_to_be_built_anew(
    box: AgentBox, old_image: str, tmp_path: Path,
) -> None:
    repository = make_repository(tmp_path / "repository")
    with docker_box(repository, "ktrdr-old", SANDBOX_IMAGE=old_image) as old:
        done = old.program.run("run", TEST_PLANS / "hello_world.md")
        assert done.returncode == 5 and "older than this program" in done.stderr
        assert "sandbox init --rebuild" in done.stderr
