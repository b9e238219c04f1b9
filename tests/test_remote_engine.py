"""The sandbox on an engine that shares neither files nor network with its client."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from boxes import DockerBox, docker_box, make_repository, require_image
from conftest import ROOT, TEST_PLANS, missing

pytestmark = [pytest.mark.docker, pytest.mark.slow]
OVERLAY = ROOT / "tests/data/docker-compose.host-network.yml"
START_TIMEOUT_S = 30
# A network namespace of its own, since an engine removes another's bridge; a mount
# namespace in which the client's folder ($1) is empty, as on another machine.
ENGINE = """
ip link set lo up && mount -t tmpfs none "$1" &&
exec dockerd --host "unix://$2/socket" --data-root "$2/data" --exec-root "$2/exec" \
    --pidfile "$2/pid" --bridge none --iptables=false --log-level error
"""


@dataclass(frozen=True)
class Engine:
    host: str
    api_url: str
    client: Path

    def environ(self) -> dict[str, str]:
        return {"DOCKER_HOST": self.host, "ANTHROPIC_BASE_URL": self.api_url,
                "ANTHROPIC_API_KEY": "sk-ant-not-a-real-key-0123456789",
                "CLAUDE_CODE_MAX_RETRIES": "1"}


def wait_for(engine: subprocess.Popen[bytes], host: str, log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(["docker", "-H", host, "info"], capture_output=True,
                         check=False).returncode:
        assert engine.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def bring_image(host: str) -> None:
    image = require_image({**os.environ})
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
        subprocess.run(["docker", "-H", host, "load", "-q"], stdin=saved.stdout,
                       check=True, capture_output=True)


@pytest.fixture(scope="module")
def engine(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
           ) -> Iterator[Engine]:
    """A second engine, and the scripted API on that engine's loopback only."""
    if os.getuid() or not all(map(shutil.which, ("dockerd", "unshare", "nsenter"))):
        missing("a second engine needs root, dockerd, unshare and nsenter")
    client = tmp_path_factory.mktemp("client")
    own = Path(tempfile.mkdtemp(prefix="engine-"))    # short: sockets lie below
    host, log = f"unix://{own}/socket", own / "log"
    argv = ["unshare", "--net", "--mount", "sh", "-c", ENGINE, "engine", client, own]
    with log.open("wb") as output:
        started = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output)
    api = None
    try:
        wait_for(started, host, log)
        bring_image(host)
        api = subprocess.Popen(
            ["nsenter", "-t", str(started.pid), "-n", sys.executable,
             TEST_PLANS / "scripted_api.py", "--port", "0"],
            stdout=subprocess.PIPE, text=True)
        assert api.stdout
        yield Engine(host, api.stdout.readline().split()[-1], client)
    finally:
        if api:
            api.kill()
            api.communicate()
        started.terminate()
        started.wait(timeout=30)
        shutil.rmtree(own)


def test_a_sandbox_lives_its_whole_life_on_a_remote_engine(engine: Engine) -> None:
    repository = make_repository(engine.client / "project")
    with docker_box(repository, "ktrdr-remote", OVERLAY, **engine.environ()) as box:
        completes(box, "three_tasks_clean", "wordstats/count.py")
        mounts = json.loads(box.docker("inspect", "-f", "{{json .Mounts}}",
                                       box.container))
        assert {mount["Type"] for mount in mounts} == {"volume"}
        box.inside("echo x >/workspace/junk")
        done = box.program.run("sandbox", "reset", "--json")
        assert done.returncode == 0, done.stderr
        assert box.inside("ls /workspace") == "README.md"
        assert box.program.run("sandbox", "down").returncode == 0
        assert box.docker("ps", "-aq") == ""


def completes(box: DockerBox, name: str, file: str) -> None:
    """Run a plan of test_plans and fetch its branch into the host repository."""
    plan = TEST_PLANS / f"{name}.md"
    done = box.program.run("run", plan, timeout_s=120)
    assert done.returncode == 0, done.stderr
    fetched(box, name, file)


def fetched(box: DockerBox, name: str, file: str) -> None:
    done = box.program.run("fetch", TEST_PLANS / f"{name}.md")
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(["git", "ls-tree", "-r", "--name-only",
                            f"orchestrator/{name}"], cwd=box.program.cwd, text=True,
                           capture_output=True, check=True).stdout
    assert file in shown.splitlines()


def test_a_docker_context_names_the_engine_as_well(engine: Engine) -> None:
    repository = make_repository(engine.client / "by-context")
    environ = engine.environ() | {"DOCKER_HOST": "", "DOCKER_CONTEXT": "elsewhere",
                                  "DOCKER_CONFIG": str(engine.client / "docker")}
    subprocess.run(["docker", "context", "create", "elsewhere", "--docker",
                    f"host={engine.host}"], check=True, capture_output=True,
                   env={**os.environ, "DOCKER_CONFIG": environ["DOCKER_CONFIG"]})
    with docker_box(repository, "ktrdr-context", OVERLAY, **environ) as box:
        completes(box, "hello_world", "hello/hello.py")


def test_two_sandboxes_on_one_engine_work_at_once_and_apart(engine: Engine) -> None:
    work = {"one": ("hello_world", "hello/hello.py"),
            "two": ("three_tasks_clean", "wordstats/count.py")}
    repositories = [make_repository(engine.client / name) for name in work]
    with (docker_box(repositories[0], "ktrdr-one", OVERLAY, **engine.environ()) as a,
          docker_box(repositories[1], "ktrdr-two", OVERLAY, **engine.environ()) as b):
        boxes = dict(zip(work, (a, b), strict=True))
        runs = [boxes[name].program.start("run", TEST_PLANS / f"{plan}.md")
                for name, (plan, _) in work.items()]
        for run in runs:
            _, told = run.communicate(timeout=120)
            assert run.returncode == 0, told
        for name, (plan, file) in work.items():
            fetched(boxes[name], plan, file)
        assert a.inside("ls") == "README.md\nhello"
        assert "hello" not in b.inside("ls").splitlines()
        assert a.container != b.container
