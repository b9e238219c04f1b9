"""Sections 9 and 10: processes are read to the end, ended in time, leave nothing."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ktrdr_orchestrator as ko

pytestmark = pytest.mark.contract
CLOCK = ko.Clock()


def run(script: str, *, stdin: bytes = b"", timeout_s: float = 20, **deadlines: float,
        ) -> tuple[ko.ProcessResult, ko.Listener]:
    ears = ko.Listener(10_000_000)
    command = ko.Command(argv=("sh", "-c", script), stdin=stdin)
    done = ko.Processes(CLOCK).run(command, listener=ears, timeout_s=timeout_s,
                                   **deadlines)
    return done, ears


def test_both_pipes_are_read_to_the_end_whatever_their_size() -> None:
    done, ears = run("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; exit 7")
    assert (done.ended, done.exit_code) == (ko.Ended.EXIT, 7)
    assert len(ears.out) == len(ears.err) == 3_000_000


def test_a_large_stdin_is_written_while_output_is_read() -> None:
    done, ears = run("cat", stdin=b"p" * 5_000_000)
    assert done.exit_code == 0 and len(ears.out) == 5_000_000


def test_a_command_that_does_not_read_its_stdin_is_no_error() -> None:
    done, ears = run("exec <&-; echo fine", stdin=b"p" * 5_000_000)
    assert (done.exit_code, ears.out) == (0, b"fine\n")


def test_a_program_that_is_not_there_is_a_sandbox_error_with_a_hint() -> None:
    with pytest.raises(ko.SandboxError, match="no-such-program") as caught:
        ko.Processes(CLOCK).run(ko.Command(argv=("no-such-program",)))
    assert caught.value.hint


@pytest.mark.parametrize(("script", "deadlines", "ended"), [
    ("exec sleep 60", {"timeout_s": 0.3}, ko.Ended.TIMEOUT),
    ("echo hello; exec sleep 60", {"idle_s": 0.3}, ko.Ended.IDLE),
    ("exec sleep 60", {"idle_s": 0.3}, ko.Ended.IDLE),
    ("yes | while read -r x; do echo $x; sleep 0.05; done",
     {"timeout_s": 0.5, "idle_s": 50}, ko.Ended.TIMEOUT)])
def test_each_deadline_ends_the_command(
    script: str, deadlines: dict[str, float], ended: ko.Ended,
) -> None:
    begun = time.monotonic()
    done, _ = run(script, **deadlines)
    assert done.ended is ended and time.monotonic() - begun < 0.5 + ko.KILL_GRACE_S + 1


def test_what_ignores_every_polite_signal_is_killed_after_the_grace() -> None:
    begun = time.monotonic()
    done, _ = run("trap '' INT TERM HUP; echo x; while :; do sleep 0.1; done",
                  idle_s=0.3)
    assert done.ended is ko.Ended.IDLE and done.exit_code is None
    assert time.monotonic() - begun < 0.5 + ko.KILL_GRACE_S + 1


def test_what_answers_the_interrupt_is_still_heard() -> None:
    # not a shell: it could not trap what a caller in the background has ignored
    answer = ("import os, signal, time\n"
              "def end(*_): os.write(1, b'costs'); os._exit(3)\n"
              "signal.signal(signal.SIGINT, end); os.write(1, b'x'); time.sleep(60)")
    ears, argv = ko.Listener(100), (sys.executable, "-S", "-c", answer)
    done = ko.Processes(CLOCK).run(ko.Command(argv=argv), listener=ears, timeout_s=1)
    assert (done.ended, done.exit_code) == (ko.Ended.TIMEOUT, 3)
    assert ears.out == b"xcosts"


def test_a_grandchild_that_holds_the_pipes_does_not_hold_us() -> None:
    begun = time.monotonic()
    done, ears = run("setsid sleep 30 & echo fine")
    assert done.ended is ko.Ended.EXIT and ears.out == b"fine\n"
    assert time.monotonic() - begun < 3
    subprocess.run(["pkill", "-s", "0", "-f", "^sleep 30$"], check=False)


def test_the_group_of_a_finished_command_is_ended() -> None:
    _, ears = run("sleep 300 & echo $!")
    pid = int(ears.out)
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] in "ZX":
            return
        time.sleep(0.02)
    raise AssertionError(f"PID {pid} lives")


SANDBOX = """
import os, pathlib, sys, ktrdr_orchestrator as ko
clock = ko.Clock()
sandbox = ko.LocalSandbox(ko.Processes(clock), ko.Config(repo=sys.argv[2]), os.environ,
                          pathlib.Path(sys.argv[1]))
sandbox.open()
"""


def sandboxed(repository: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with a `sandbox` in a process of its own (it becomes a subreaper)."""
    return subprocess.run(
        [sys.executable, "-c", SANDBOX + code, repository / "w", repository],
        cwd=Path(ko.__file__).parent, capture_output=True, text=True, check=False,
        timeout=60)


@pytest.fixture
def strays() -> Iterator[None]:
    """Fails if a sleep of 777 s is alive afterwards."""
    yield
    shown = subprocess.run(["pgrep", "-f", "^sleep 777$"], capture_output=True,
                           check=False)
    for pid in shown.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert shown.stdout == b""


@pytest.mark.parametrize("escape", [
    "sleep 777 &", "nohup sleep 777 &", "setsid sleep 777 &", "setsid -f sleep 777",
    "(setsid nohup sleep 777 &) &", "env -i setsid -f /bin/sleep 777",
    "(trap '' INT TERM HUP; exec setsid -f sleep 777)",
    "setsid sh -c 'sleep 777 & kill -STOP $!' & sleep 0.2"])
def test_nothing_escapes_the_sweep(repository: Path, strays: None, escape: str) -> None:
    code = f"sandbox.sh({escape + ' >/dev/null 2>&1'!r}); sandbox.close()"
    done = sandboxed(repository, code)
    assert done.returncode == 0, done.stderr


GIT_WORK = """
base = sandbox.start_branch("b", "HEAD", kept_as="refs/orchestrator/t/replaced/1")
"""


@pytest.mark.parametrize("mess", [
    "echo x >new.txt", "git commit -qm own --allow-empty", "git checkout -qb other",
    "git checkout -q --detach", "rm README.md", "touch .git/index.lock",
    "mkdir a; git -C a init -q",
    ("git checkout -q --orphan lost; git rm -rfq .; "
     "echo y >z; git add z; git commit -qm lost"),
    "mkdir -p d/e; touch d/e/f; chmod 500 d", "printf '*.o' >.gitignore; touch a.o"])
def test_a_checkpoint_takes_whatever_the_agent_left_and_a_rollback_undoes_it(
    repository: Path, mess: str,
) -> None:
    code = GIT_WORK + f"""
sandbox.sh({mess!r}, is_gate=True)
commit = sandbox.checkpoint("b", base, ref="refs/orchestrator/t/checkpoints/1",
                            message="M")
def git(*args): return sandbox.sh("git " + " ".join(args)).output
assert git("symbolic-ref", "HEAD") == "refs/heads/b", git("symbolic-ref", "HEAD")
assert git("rev-parse", "HEAD") == commit
assert git("merge-base", base, "HEAD") == base
assert git("status", "--porcelain") in ("", "?? a/"), git("status", "--porcelain")
sandbox.sh("echo rejected >rejected.txt; git checkout -q -b elsewhere")
sandbox.rollback("b", base, ref="refs/orchestrator/t/rejected/1", message="R")
assert git("rev-parse", "HEAD", "b") == base + chr(10) + base
assert git("status", "--porcelain") == "", git("status", "--porcelain")
assert git("show", "refs/orchestrator/t/rejected/1:rejected.txt") == "rejected"
sandbox.close()
"""
    done = sandboxed(repository, code)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_clone_leads_back_to_the_repository(repository: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in repository.rglob("*"))
    code = GIT_WORK + """
print(sandbox.sh("git remote; find .git/objects -type f -links +1; "
                 "cat .git/objects/info/alternates 2>/dev/null; :").output)
sandbox.close()
"""
    done = sandboxed(repository, code)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr
    inside = repository / "w"
    after = sorted((p, p.stat().st_mtime_ns) for p in repository.rglob("*")
                   if inside not in (p, *p.parents))
    assert [x for x in after if x[0] != repository] == \
        [x for x in before if x[0] != repository]


def test_without_a_repository_the_workspace_starts_empty(tmp_path: Path) -> None:
    code = GIT_WORK + ("print(sandbox.sh('git log --format=%s; ls').output); "
                       "sandbox.close()")
    done = sandboxed(tmp_path, code)
    assert done.returncode == 0 and done.stdout.strip() == "Start", done.stderr


def test_the_base_is_meant_as_the_host_reads_it(repository: Path) -> None:
    git = ["git", "-c", "user.name=S", "-c", "user.email=s@localhost"]
    subprocess.run([*git, "checkout", "-qb", "side"], cwd=repository, check=True)
    subprocess.run([*git, "commit", "-qm", "Side", "--allow-empty"], cwd=repository,
                   check=True)
    subprocess.run([*git, "checkout", "-q", "main"], cwd=repository, check=True)
    code = 'sandbox.start_branch("b", "side", kept_as="refs/x/y")\n' \
           'print(sandbox.sh("git log -1 --format=%s").output); sandbox.close()'
    assert sandboxed(repository, code).stdout.strip() == "Side"
