"""Docker sandboxes of the tests' own: bounded, filled from a repository, removed."""
from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT, missing
from program import Program
from scripted_api import ScriptedApi
from scripted_claude import load_scenarios

import ktrdr_orchestrator as ko

NOBODY = "65534"                 # holds the sandbox's lock
COMPOSE_FILE = ROOT / "sandbox/docker-compose.yml"
# A hostile test must not cost the machine more than this.
LIMITS = {"SANDBOX_PIDS": "256", "SANDBOX_MEMORY": "512m",
          "SANDBOX_TMP_SIZE": "32m", "SANDBOX_HOME_SIZE": "32m"}


CLOCK = ko.Clock()
KEY = "sk-ant-not-a-real-key-0123456789"


def wait_until(is_true: Callable[[], bool], *, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < until, "nothing came of it in time"
        time.sleep(0.1)


class DockerBox:
    """One compose project; `program` and `sandbox` are bound to it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.files = program.environ["ORCHESTRATOR_COMPOSE_FILES"]
        self.sandbox = ko.DockerSandbox(
            ko.Processes(CLOCK), ko.Config(compose_files=self.files), program.environ)

    def docker(self, *args: str) -> str:
        return self._run("docker", *args)

    def compose(self, *args: str) -> str:
        files = (part for file in self.files.split(os.pathsep) for part in ("-f", file))
        return self._run("docker", "compose", *files, *args)

    def _run(self, *argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False,
                              env=self.program.environ, timeout=300)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def inside(self, script: str) -> str:
        return self.compose("exec", "-T", "sandbox", "sh", "-c", script)

    @property
    def container(self) -> str:
        return self.compose("ps", "-aq", "sandbox")

    def running(self) -> list[str]:
        """Command lines of the agent's user as the engine sees them, PID 1's apart."""
        shown = self.docker("top", self.container, "-eo", "pid,uid,args").splitlines()
        lines = (line.split(None, 2)[1:] for line in shown[1:])
        return [args for uid, args in lines
                if uid != NOBODY and "sandbox/entrypoint.sh" not in args]


def require_image(environ: dict[str, str], files: str = str(COMPOSE_FILE)) -> str:
    """The name of the sandbox image, which is there."""
    argv = ["docker", "compose", "-f", files.split(os.pathsep)[0], "config", "--images"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=False,
                           env=environ)
    if shown.returncode:
        missing(f"docker compose is not usable: {shown.stderr.strip()}")
    image = shown.stdout.split()[0]
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True,
                      check=False, env=environ).returncode:
        missing(f"image {image} is not built (.ci/install)")
    return image


@contextlib.contextmanager
def docker_box(folder: Path, project: str, *overlays: Path, **environ: str,
               ) -> Iterator[DockerBox]:
    """Initialised from the repository `folder`; volumes and all are removed after."""
    program = Program(folder, **{
        "SANDBOX_PROJECT": f"{project}-{os.getpid()}", **LIMITS, **environ,
        "ORCHESTRATOR_COMPOSE_FILES": os.pathsep.join(
            map(str, (COMPOSE_FILE, *overlays)))})
    require_image(program.environ)
    box = DockerBox(program)
    try:
        done = program.run("sandbox", "init", timeout_s=600)
        assert done.returncode == 0, done.stderr
        yield box
    finally:
        box.compose("--profile", "janitor", "down", "-v", "-t", "0")


class AgentBox(DockerBox):
    """One whose agent, the real CLI, talks to a scripted Messages API on loopback."""

    api: ScriptedApi
    started: list[subprocess.Popen[str]]

    def end_runs(self) -> None:
        """Those that a failed test left."""
        while self.started:
            if (run := self.started.pop()).poll() is None:
                run.kill()
                run.communicate(timeout=30)

    def hanging_run(self, folder: Path) -> subprocess.Popen[str]:
        """A run whose agent works on a long command, with a daemon besides."""
        plan = folder / "hang.md"
        plan.write_text("# Hang\n\n## Task 1.1: Wait\n\nWait.\n")
        self.api.scenarios["hang/1.1"] = {"attempts": [[
            {"bash": "setsid sleep 600 >/dev/null 2>&1 & echo started"},
            {"bash": "python3 -c 'import time; time.sleep(600)'"}]]}
        started = self.program.start("run", plan, "--fresh")
        self.started.append(started)
        wait_until(lambda: any("time.sleep(600)" in line for line in self.running())
                   or started.poll() is not None)
        assert started.poll() is None, started.communicate()
        return started


@contextlib.contextmanager
def agent_box(folder: Path, project: str) -> Iterator[AgentBox]:
    if not (folder / ".git").exists():
        make_repository(folder)
    with ScriptedApi(dict(load_scenarios())) as api, docker_box(
            folder, project, ROOT / "tests/data/docker-compose.host-network.yml",
            ANTHROPIC_BASE_URL=api.url, ANTHROPIC_API_KEY=KEY, SANDBOX_PIDS="512",
            CLAUDE_CODE_MAX_RETRIES="1", SANDBOX_MEMORY="2g") as box:
        made = AgentBox(box.program)
        made.api, made.started = api, []
        yield made


def make_repository(folder: Path) -> Path:
    """A git repository with one commit, One."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("# A project\n")
    git = ("git", "-c", "user.name=Somebody", "-c", "user.email=somebody@localhost")
    for args in (("init", "-q", "-b", "main"), ("add", "."), ("commit", "-qm", "One")):
        subprocess.run([*git, *args], cwd=folder, check=True)
    return folder
