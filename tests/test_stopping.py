"""Both sandboxes keep the same promises: what ends, what is committed, what is told."""
from __future__ import annotations

import ast
import ctypes
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boxes import docker_box, make_repository
from conftest import ROOT

import ktrdr_orchestrator as ko

ZOO = Path(__file__).with_name("zoo.py").read_text(encoding="utf-8")
KINDS = ("foreground", "nohup", "setsid", "daemon", "daemon_without_environment",
         "deaf", "stopped", "watchdogs", "hopper")
LIFE_S = 60          # of a process that a failed test leaves
GONE_WITHIN_S = 1.0
DRIVER = """
import os, pathlib, sys, ktrdr_orchestrator as ko
kind, where, repository, *argv = sys.argv[1:]
processes = ko.Processes(ko.Clock())
sandbox = ko.DockerSandbox(processes, ko.Config(compose_files=where), os.environ) \\
    if kind == "docker" else ko.LocalSandbox(
    processes, ko.Config(repo=repository), os.environ, pathlib.Path(where))
sandbox.open()
processes.run(sandbox.command(argv, b""), listener=ko.Listener(99), timeout_s=60)
"""


class Place:
    """A sandbox that is open, and a look at it from outside."""

    def __init__(self, kind: str, sandbox: ko.Sandbox, running: Callable[[], list[str]],
                 environ: dict[str, str], driver: tuple[str, ...]) -> None:
        self.kind, self.sandbox, self.running = kind, sandbox, running
        self.environ, self.driver = environ, driver
        self.processes = ko.Processes(ko.Clock())

    def alive(self, mark: str) -> list[str]:
        return [line for line in self.running() if mark in line]

    def hops(self, mark: str) -> int:
        done = self.sandbox.sh('stat -c %s ".git/$1" 2>/dev/null || echo 0', mark)
        return int(done.output)

    def git(self, *args: str) -> str:
        done = self.sandbox.sh('git "$@"', *args)
        assert done.exit_code == 0, done.output
        return done.output


class Ready(ko.Listener):
    """Hears "ready" `times` times, takes a look, then has the call interrupted."""

    def __init__(self, look: Callable[[], list[str]], times: int = 1) -> None:
        super().__init__(1000)
        self._look, self._times, self.seen = look, times, list[str]()

    def hear(self, data: bytes, *, is_error: bool) -> None:
        super().hear(data, is_error=is_error)
        if not is_error and self.out.count(b"ready") == self._times:
            self.seen = self._look()
            raise ko.Interrupted(signal.SIGTERM)


def command_lines() -> dict[int, str]:
    """Of this machine; a zombie has none."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(entry.parent.name)] = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


@pytest.fixture(scope="module", params=[
    pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.slow]),
    pytest.param("local", marks=pytest.mark.contract)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
          ) -> Iterator[Place]:
    repository = make_repository(tmp_path_factory.mktemp("stopping") / "repository")
    if request.param == "docker":
        request.getfixturevalue("docker_engine")
        with docker_box(repository, "ktrdr-stopping") as box:
            box.sandbox.open()
            yield Place("docker", box.sandbox, box.running, box.program.environ,
                        ("docker", box.files, ""))
            box.sandbox.close()
        return
    # its sweep takes every child of this process for the agent's
    assert not Path("/proc/thread-self/children").read_text(), "a child of another test"
    local = ko.LocalSandbox(ko.Processes(ko.Clock()), ko.Config(repo=str(repository)),
                            os.environ, repository / "state/w")
    local.open()
    yield Place("local", local, lambda: [*command_lines().values()], {**os.environ},
                ("local", str(repository / "state/driver"), str(repository)))
    local.close()
    ctypes.CDLL(None).prctl(ko.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def mark() -> Iterator[str]:
    """Stands in every command line of a test's zoo; a local leftover is ended."""
    name = f"zoo-{secrets.token_hex(6)}"
    yield name
    for pid, line in command_lines().items():
        if name in line:
            os.kill(pid, signal.SIGKILL)


def zoo(kind: str, mark: str) -> list[str]:
    return ["python3", "-S", "-c", ZOO, kind, str(time.time() + LIFE_S), mark]


def swept(place: Place, *, within_s: float = GONE_WITHIN_S) -> None:
    begun = time.monotonic()
    assert place.sandbox.sweep() is None
    assert time.monotonic() - begun < within_s


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_an_agent_starts_is_gone_after_the_sweep(
    place: Place, mark: str, kind: str,
) -> None:
    heard = Ready(lambda: place.alive(mark))
    done = place.processes.run(place.sandbox.command(zoo(kind, mark)),
                               listener=heard, timeout_s=20)
    assert done.interrupted and heard.seen, heard.err
    assert len(heard.seen) > 1 or place.hops(mark)
    swept(place)
    assert place.alive(mark) == []
    assert place.hops(mark) == place.hops(mark)


def test_all_of_them_at_once_are_gone_after_an_interrupted_agent(
    place: Place, mark: str,
) -> None:
    argv = zoo("$kind", mark)
    script = f"for kind in {' '.join(KINDS)}; do {shlex.join(argv)} & done; wait"
    script = script.replace("'$kind'", "$kind")
    heard = Ready(lambda: place.alive(mark), times=len(KINDS))
    agent = place.sandbox.command(["sh", "-c", script], b"")
    done = place.processes.run(agent, listener=heard, timeout_s=30)
    assert done.interrupted and len(heard.seen) > 2 * len(KINDS), heard.err
    swept(place)
    assert place.alive(mark) == []
    assert 0 < place.hops(mark) == place.hops(mark)


def test_an_agent_that_is_out_of_time_says_its_last_words_and_leaves_nothing(
    place: Place, mark: str,
) -> None:
    script = ("import signal, subprocess, sys, time\n"
              "signal.signal(signal.SIGINT, lambda *_: sys.exit('costs 1'))\n"
              "subprocess.Popen(['setsid', 'sleep', '60'])\n"
              "print('begun', flush=True); time.sleep(60)")
    heard = ko.Listener(1000)
    done = place.processes.run(place.sandbox.command(
        ["python3", "-c", script, mark], b""), listener=heard, timeout_s=2)
    assert done.ended is ko.Ended.TIMEOUT and b"costs 1" in heard.err
    assert done.duration_s < 2 + ko.KILL_GRACE_S
    swept(place)
    assert place.alive(mark) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (
    "daemon_without_environment", "hopper")])
def test_a_killed_orchestrator_leaves_nothing_of_its_agent(
    place: Place, mark: str, kind: str,
) -> None:
    if isinstance(place.sandbox, ko.DockerSandbox):
        place.sandbox.release()                  # it is the driver's now
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *place.driver, *zoo(kind, mark)],
        cwd=Path(ko.__file__).parent, env=place.environ, stdin=subprocess.DEVNULL)
    until = time.monotonic() + 20
    # the driver has the mark in its command line, so has its docker client
    mine = 2 if place.kind == "local" else 1
    while len(seen := place.alive(mark)) <= mine and time.monotonic() < until:
        time.sleep(0.1)
    assert len(seen) > mine
    time.sleep(0.3)
    driver.kill()
    driver.wait()
    until = time.monotonic() + 8
    while place.alive(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert place.alive(mark) == []
    if isinstance(place.sandbox, ko.DockerSandbox):
        place.sandbox.open()


GIT_REF = "refs/orchestrator/stopping/"


def begun(place: Place) -> tuple[str, str]:
    """A new branch and its base."""
    branch = f"b-{secrets.token_hex(4)}"
    return branch, place.sandbox.start_branch(branch, "HEAD",
                                              kept_as=f"{GIT_REF}{branch}/replaced")


def test_what_a_task_left_uncommitted_is_committed(place: Place) -> None:
    branch, base = begun(place)
    place.sandbox.sh("echo new >new; rm README.md; mkdir d; echo x >d/'a b'")
    commit = place.sandbox.checkpoint(branch, base, ref=f"{GIT_REF}{branch}/1",
                                      message="Task 1.1: Work")
    assert place.git("status", "--porcelain") == ""
    assert place.git("symbolic-ref", "HEAD") == f"refs/heads/{branch}"
    assert place.git("log", "--format=%s", branch) == "Task 1.1: Work\nOne"
    assert place.git("ls-tree", "-r", "--name-only", commit) == "d/a b\nnew"
    assert place.git("rev-parse", f"{GIT_REF}{branch}/1") == commit
    assert place.sandbox.has_commit(commit) and not place.sandbox.has_commit("1" * 40)


def test_rejected_work_is_gone_from_the_branch_and_stays_reachable(
    place: Place,
) -> None:
    branch, base = begun(place)
    place.sandbox.sh("echo good >done; git add done; git commit -qm own; echo b >rest")
    place.sandbox.rollback(branch, base, ref=f"{GIT_REF}{branch}/rejected",
                           message="Rejected")
    assert place.git("rev-parse", "HEAD", branch) == f"{base}\n{base}"
    assert place.git("status", "--porcelain", "--ignored") == ""
    kept = place.git("ls-tree", "--name-only", f"{GIT_REF}{branch}/rejected")
    assert kept == "README.md\ndone\nrest"


def test_a_branch_that_is_in_the_way_stays_reachable(place: Place) -> None:
    branch, base = begun(place)
    place.sandbox.sh("git commit -qm old --allow-empty")
    again = place.sandbox.start_branch(branch, "HEAD", kept_as=f"{GIT_REF}{branch}/old")
    assert again == base == place.git("rev-parse", "HEAD")
    assert place.git("log", "-1", "--format=%s", f"{GIT_REF}{branch}/old") == "old"


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_bundle_brings_the_branch_out_byte_for_byte(
    place: Place, tmp_path: Path, is_whole: bool,
) -> None:
    branch, base = begun(place)
    place.sandbox.sh("head -c 3000000 /dev/urandom >large")
    commit = place.sandbox.checkpoint(branch, base, ref=f"{GIT_REF}{branch}/1",
                                      message="Large")
    file = tmp_path / "b.bundle"
    file.write_bytes(place.sandbox.bundle(commit, "" if is_whole else base))
    shown = subprocess.run(["git", "bundle", "list-heads", file], check=True,
                           capture_output=True, text=True).stdout
    assert shown.split() == [commit, ko.BUNDLED]
    assert (base.encode() in file.read_bytes()[:200]) is not is_whole   # prerequisite


@pytest.mark.parametrize(("gate", "exit_code", "output"), [
    ("echo fine", 0, "fine"), ("echo bad >&2; exit 7", 7, "bad"),
    ("echo first; false\necho last", 1, "first"), ("! false; :", 0, ""),
    ("no-such-program", 127, "not found"), ("kill -9 $$", 137, ""),
    ("pwd >/dev/null; cat README.md", 0, "# A project")])
def test_a_gate_tells_its_status_and_what_it_said(
    place: Place, gate: str, exit_code: int, output: str,
) -> None:
    begun(place)
    done = place.sandbox.sh(gate, is_gate=True)
    # a signal is negative where it is ours to see, 128+n through docker
    assert done.exit_code == exit_code or done.exit_code == 128 - exit_code
    assert output in done.output


def test_a_gate_that_takes_too_long_ends_and_leaves_nothing(
    place: Place, mark: str,
) -> None:
    done = place.sandbox.sh(f"sleep 60; : {mark}", is_gate=True, timeout_s=0.5)
    assert done.ended is ko.Ended.TIMEOUT
    assert done.duration_s < 0.5 + ko.KILL_GRACE_S + ko.DRAIN_GRACE_S + 1
    swept(place)
    assert place.alive(mark) == []


def test_an_output_of_megabytes_arrives_byte_for_byte(place: Place) -> None:
    script = ('python3 -S -c "import os\nfor _ in range(4000): '
              'os.write(1, bytes(range(256)) * 4)"')
    done = place.sandbox.sh(script, max_bytes=8 << 20)
    assert done.stdout == bytes(range(256)) * 16000


def test_a_prompt_arrives_byte_for_byte(place: Place) -> None:
    prompt = bytes(range(256)) * 4096 + "Grüße \r\n\0".encode()
    heard = ko.Listener(2 << 20)
    done = place.processes.run(place.sandbox.command(["cat"], prompt),
                               listener=heard, timeout_s=20)
    assert (done.exit_code, bytes(heard.out)) == (0, prompt)


KILL_EVERYTHING = re.compile(r"kill\s+(-\w+\s+)*-1\b|kill\(\s*-1")


def test_only_the_container_is_ever_sent_a_kill_of_everything() -> None:
    program = Path(ko.__file__).read_text(encoding="utf-8")
    script = (ROOT / "sandbox/end-all.sh").read_text(encoding="utf-8")
    assert KILL_EVERYTHING.search(script) and not KILL_EVERYTHING.search(program)
    users = {getattr(node, "name", "") for node in ast.parse(program).body
             if "end-all" in ast.unparse(node)}
    assert users == {"DockerSandbox"}
