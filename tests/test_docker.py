"""The real CLI in the real Docker sandbox, against the scripted Messages API."""
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TEST_PLANS, missing
from program import Program
from scripted_api import ScriptedApi
from scripted_claude import load_scenarios

pytestmark = [pytest.mark.docker]
COMPOSE = (ROOT / "sandbox/docker-compose.yml",
           ROOT / "tests/data/docker-compose.host-network.yml")
FILES = os.pathsep.join(map(str, COMPOSE))
KEY = "sk-ant-not-a-real-key-0123456789"
PROJECT = f"ktrdr-test-{os.getpid()}"


class Box:
    """A sandbox of the tests' own, initialised from a host repository."""

    def __init__(self, program: Program, api: ScriptedApi) -> None:
        self.program, self.api = program, api

    def compose(self, *args: str) -> str:
        files = (a for f in COMPOSE for a in ("-f", str(f)))
        argv = ["docker", "compose", *files, *args]
        return subprocess.run(argv, capture_output=True, text=True, check=True,
                              env={**os.environ, "SANDBOX_PROJECT": PROJECT}).stdout

    def inside(self, script: str) -> str:
        return self.compose("exec", "-T", "sandbox", "sh", "-c", script).strip()

    def processes(self) -> list[str]:
        """What runs in the sandbox but PID 1 and the look itself."""
        shown = self.inside("ps -e -o pid=,ppid=,args=").splitlines()
        return [x for x in shown if x.split()[0] != "1" and "ps -e" not in x]


@pytest.fixture(scope="module")
def api() -> Iterator[ScriptedApi]:
    with ScriptedApi(dict(load_scenarios())) as server:
        yield server


@pytest.fixture(scope="module")
def box(docker_engine: str, api: ScriptedApi, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[Box]:
    image = os.environ.get("SANDBOX_IMAGE", "ktrdr-sandbox")
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True,
                      check=False).returncode:
        missing(f"image {image} is not built (.ci/install)")
    folder = tmp_path_factory.mktemp("docker")
    git = ("git", "-c", "user.name=S", "-c", "user.email=s@localhost")
    for args in (("init", "-q", "-b", "main"), ("commit", "-q", "--allow-empty", "-m",
                                                "One")):
        subprocess.run([*git, *args], cwd=folder, check=True)
    program = Program(folder, SANDBOX_PROJECT=PROJECT, ORCHESTRATOR_COMPOSE_FILES=FILES,
                      ANTHROPIC_BASE_URL=api.url, ANTHROPIC_API_KEY=KEY,
                      CLAUDE_CODE_MAX_RETRIES="1",
                      BASE_IMAGE=os.environ.get("BASE_IMAGE",
                                                "orchestrator-base:bookworm"))
    made = Box(program, api)
    try:
        done = program.run("sandbox", "init", timeout_s=600)
        assert done.returncode == 0, done.stderr
        yield made
    finally:
        made.compose("down", "-v", "-t", "0")


def test_init_clones_the_host_repository_and_keeps_it_the_second_time(box: Box) -> None:
    again = box.program.run("sandbox", "init", timeout_s=300)
    assert again.returncode == 0 and "kept" in again.stdout
    assert "2.1.330" in again.stdout
    assert box.inside("git log --format=%s main") == "One"
    assert box.inside("git remote") == ""


@pytest.mark.parametrize(("name", "files"), [
    ("hello_world", "hello/hello.py"), ("health_check", "health/telemetry.py"),
    ("three_tasks_clean", "")])
def test_a_plan_runs_to_completion_with_the_real_cli(
    box: Box, name: str, files: str,
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
    assert box.processes() == []


def test_the_branch_is_fetched_into_the_host_repository(box: Box) -> None:
    plan = TEST_PLANS / "hello_world.md"
    box.program.run("run", plan, timeout_s=300)
    done = box.program.run("fetch", plan)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(["git", "show", "orchestrator/hello_world:hello/hello.py"],
                           cwd=box.program.cwd, capture_output=True, text=True,
                           check=True)
    assert "Hello" in shown.stdout


def test_a_question_is_answered_in_the_same_session(box: Box) -> None:
    plan = TEST_PLANS / "ambiguous_task.md"
    assert box.program.run("run", plan, timeout_s=300).returncode == 3
    done = box.program.run("resume", plan, "--answer", "b", timeout_s=300)
    assert done.returncode == 0, done.stderr
    task = box.program.state("ambiguous_task")["task_results"]["1.1"]
    first, second = task["attempts"]
    assert first["session_id"] == second["session_id"]


def hanging_run(box: Box, folder: Path) -> subprocess.Popen[str]:
    """A run whose agent works on a long command, with a daemon besides."""
    plan = folder / "hang.md"
    plan.write_text("# Hang\n\n## Task 1.1: Wait\n\nWait.\n")
    box.api.scenarios["hang/1.1"] = {"attempts": [[
        {"bash": "setsid sleep 600 >/dev/null 2>&1 & echo started"},
        {"bash": "python3 -c 'import time; time.sleep(600)'"}]]}
    started = box.program.start("run", plan, "--fresh")
    until = time.monotonic() + 60
    while not any("time.sleep(600)" in line for line in box.processes()):
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.2)
    return started


def test_the_key_is_in_no_argv_and_not_in_the_containers_settings(
    box: Box, tmp_path: Path,
) -> None:
    started = hanging_run(box, tmp_path)
    shown = subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True,
                           text=True, check=True).stdout
    container = box.compose("ps", "-q", "sandbox").strip()
    shown += subprocess.run(["docker", "inspect", container], capture_output=True,
                            text=True, check=True).stdout
    started.terminate()
    started.communicate(timeout=30)
    assert KEY not in shown
    assert started.returncode == 143 and box.processes() == []


def test_a_killed_run_takes_its_agent_in_the_sandbox_along(
    box: Box, tmp_path: Path,
) -> None:
    started = hanging_run(box, tmp_path)
    started.kill()
    started.communicate(timeout=30)
    until = time.monotonic() + 15
    while box.processes() and time.monotonic() < until:
        time.sleep(0.2)
    assert box.processes() == []


def test_reset_clears_the_workspace_and_keeps_models(box: Box) -> None:
    box.inside("touch /workspace/junk /env/logs/x /env/models/m && mkdir /workspace/d")
    done = box.program.run("sandbox", "reset", "--json")
    assert done.returncode == 0, done.stderr
    assert box.inside("ls /workspace /env/logs /env/models | grep -v : | xargs") == "m"
    assert box.inside("git symbolic-ref --short HEAD") == "main"


def test_a_sandbox_that_was_stopped_is_started_by_the_next_run(box: Box) -> None:
    box.compose("stop", "-t", "0")
    plan = TEST_PLANS / "three_tasks_clean.md"
    done = box.program.run("run", plan, "--fresh", timeout_s=300)
    assert done.returncode == 0, done.stderr
