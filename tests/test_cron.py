"""Nights: started by a real cron and a real systemd, and with how little it can do."""
from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from boxes import agent_box
from conftest import ROOT, TEST_PLANS, missing
from program import LOCAL, PROGRAM, SCRIPTED, Program

import ktrdr_orchestrator as ko

pytestmark = pytest.mark.contract
AMBIGUOUS = TEST_PLANS / "ambiguous_task.md"
HELLO = TEST_PLANS / "hello_world.md"
DEPLOY = ROOT / "deploy"
SCHEDULE = "*/15 22-23,0-5 * * * "
ASKS: dict[str, Any] = {"attempts": [[{"report": {
    "status": "needs_human", "summary": "Not decided.", "question": "Where to?",
    "options": ["memory", "file"], "recommendation": "memory"}}]]}
ANSWERED = {"attempts": [[
    {"hang": True, "times": 1}, {"sleep": 5},        # a person sees the first of these
    *json.loads((TEST_PLANS / "scenarios.json").read_text())[
        "ambiguous_task/1.1/answer"]["attempts"][0]]]}


def wait_for(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


# ---- a person's home: ~/project with plan.md and settings, ~/.local/bin --------------

@pytest.fixture
def home(tmp_path: Path, repository: Path) -> Path:
    repository.rename(tmp_path / "project")
    shutil.copy(AMBIGUOUS, tmp_path / "project/plan.md")
    (tmp_path / "project/orchestrator.ini").write_text(
        f"[orchestrator]\nsandbox = local\nclaude = {sys.executable} -S {SCRIPTED}\n")
    (tmp_path / "scenarios.json").write_text(json.dumps(
        {"plan/1.1": ASKS, "plan/1.1/answer": ANSWERED}))
    return tmp_path


@pytest.fixture
def person(home: Path) -> Program:
    """At a shell of the same home."""
    program = Program(home / "project", **variables(home), HOME=str(home))
    program.log = home / "calls.log"
    return program


def variables(home: Path) -> dict[str, str]:
    """The scripted agent's."""
    return {"SCRIPTED_CLAUDE_SCENARIOS": str(home / "scenarios.json"),
            "SCRIPTED_CLAUDE_LOG": str(home / "calls.log"),
            "CLAUDE_CONFIG_DIR": str(home / ".claude")}


def install(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# A daemon does not outlive the tests, however these end.
OWN = ("setpriv", "--pdeathsig", "TERM", "unshare")


def calls(person: Program) -> int:
    return len(person.calls())


def is_hanging(home: Path) -> bool:
    """The scripted agent is, and the next will not: it remembers that."""
    return any((home / ".claude").rglob("times-*_0"))


def needs(what: str, package: str) -> None:
    if not shutil.which(what, path="/usr/sbin:/usr/bin:/sbin:/bin"):
        missing(f"{what} is not installed (Debian: apt install {package})")
    if os.geteuid() != 0:
        missing("a daemon of its own, in a mount namespace, needs root")


# ---- cron ----------------------------------------------------------------------------

# A mount namespace of its own: this cron sees one crontab and no other, mails to a
# file, and neither meets nor disturbs the machine's own. Docker's socket stays.
CRON = """\
set -e
[ ! -S /run/docker.sock ] || {
    touch run/docker.sock
    mount --bind /run/docker.sock run/docker.sock
}
mount --bind crontabs /var/spool/cron/crontabs
mount --bind empty /etc/cron.d
mount --rbind run /run
mount -t overlay overlay -o "lowerdir=$PWD/sbin:/usr/sbin" /usr/sbin
for file in /etc/crontab /etc/environment /etc/default/locale; do
    [ ! -e "$file" ] || mount --bind /dev/null "$file"
done
exec cron -f -L 0
"""


@contextlib.contextmanager
def cron(folder: Path, crontab: str) -> Iterator[None]:
    for name in ("crontabs", "empty", "run"):
        (folder / name).mkdir(parents=True)
    install(folder / "sbin/sendmail", f"exec cat >>{folder}/mail")
    (folder / "crontabs/root").write_text(crontab)
    (folder / "crontabs/root").chmod(0o600)
    with open(folder / "daemon.log", "wb") as log, subprocess.Popen(
            [*OWN, "--mount", "sh", "-c", CRON], cwd=folder, stdout=log,
            stderr=log, stdin=subprocess.DEVNULL) as daemon:
        try:
            yield
            assert daemon.poll() is None, (folder / "daemon.log").read_text()
        finally:
            daemon.terminate()


@dataclass(frozen=True)
class Night:
    """A home where cron works, and a person at a shell of the same home."""
    home: Path
    person: Program
    variables: dict[str, str]                # the tests' own
    is_at_work: Callable[[], bool]           # the agent, on the person's answer
    running: Callable[[], Sequence[object]]

    def calls(self) -> int:
        """Of the agent, by what is left of each."""
        return len([*self.home.glob("project/state/plan/*.ndjson")])


@pytest.fixture(params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def night(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Night]:
    """By the scripted agent, and by the real CLI in the Docker sandbox."""
    if request.param == "local":
        home, person = map(request.getfixturevalue, ("home", "person"))
        yield Night(home, person, variables(home), lambda: is_hanging(home),
                    person.alive)
        return
    request.getfixturevalue("docker_engine")
    with agent_box(tmp_path / "project", "ktrdr-night") as box:
        shutil.copy(AMBIGUOUS, tmp_path / "project/plan.md")
        box.api.scenarios |= {"plan/1.1": ASKS, "plan/1.1/answer": ANSWERED}
        given = box.program.environ.items() - os.environ.items()
        yield Night(tmp_path, box.program, dict(given), box.api.hanging.is_set,
                    box.running)


def crontab(night: Night, starts: dict[int, str]) -> str:
    """The example for this home: a start of a plan so many seconds into each minute."""
    text = (DEPLOY / "cron/crontab").read_text().replace("/home/me", str(night.home))
    head, found, command = text.partition(f"\n{SCHEDULE}")
    assert found and "\n" not in command.strip()
    given = {"HOME": str(night.home), **night.variables}
    return "\n".join([*(f"{k}={v}" for k, v in given.items()), head, *(
        f"* * * * * sleep {at_s}; {command.strip().replace('plan.md', plan)}"
        for at_s, plan in starts.items()), ""])


@pytest.mark.slow
def test_cron_begins_a_milestone_and_finishes_it_when_its_question_was_answered(
    night: Night,
) -> None:
    needs("cron", "cron")
    home, person = night.home, night.person
    install(home / ".local/bin/ktrdr-orchestrator", f"""\
[ -e {home}/environment ] || env >{home}/environment
{sys.executable} {PROGRAM} "$@"
status=$?
echo $status >>{home}/statuses
exit $status""")

    def read(name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (home / name).read_text()
        return ""

    def statuses() -> list[int]:
        return [int(line) for line in read("statuses").split()]

    starts = {0: "plan.md", 8: "plan.md", 20: "plan.md", 22: "plan.md",
              42: "plan.md", 44: "gone.md"}
    with cron(home / "cron", crontab(night, starts)):
        wait_for(lambda: len(statuses()) == 2, timeout_s=90)
        assert night.calls() == 1 and not night.running()
        assert "Where to?" in person.run("status", "plan.md").stdout
        resumed = person.start("resume", "plan.md", "--answer", "a")
        wait_for(night.is_at_work)
        resumed.send_signal(signal.SIGINT)       # answered; the night may go on with it
        resumed.communicate(timeout=10)
        assert resumed.returncode == ko.ExitCode.INTERRUPTED
        wait_for(lambda: "gone.md" in read("cron/mail"), timeout_s=60)
    parked, running = ko.ExitCode.NEEDS_HUMAN, ko.ExitCode.LOCKED
    assert statuses() == [parked, parked, running, 0, 0, ko.ExitCode.USAGE]
    assert night.calls() == 3 and not night.running()
    assert person.state("plan")["completed_tasks"] == ["1.1"]
    assert "is completed; --fresh" in read("night.log")
    assert "\x1b" not in read("night.log")
    assert stat.S_IMODE((home / "night.log").stat().st_mode) == 0o600
    (mail,) = read("cron/mail").split("From: root (Cron Daemon)")[1:]
    assert "gone.md: No such file or directory" in mail and "To: me" in mail
    given = read("environment")
    names = set(re.findall(r"^(\w+)=", given, re.MULTILINE))
    assert names - night.variables.keys() <= {
        "HOME", "LOGNAME", "SHELL", "PATH", "LANG", "MAILTO", "PWD", "OLDPWD", "_"}


# ---- systemd -------------------------------------------------------------------------

# A user's manager, with a /run of its own (it asks there whether systemd booted) and a
# cgroup of its own, since the one that it starts in may belong to others.
MANAGER = """\
set -e
mkdir -p run/systemd/system
mount --bind run /run
umount --lazy /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$1"
echo $$ >"/sys/fs/cgroup/$1/cgroup.procs"
export XDG_RUNTIME_DIR="$PWD/xdg"
/lib/systemd/systemd --user --log-target=console &
trap 'kill $!' TERM
wait $! || wait $! || :
echo $$ >/sys/fs/cgroup/cgroup.procs
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"""


@pytest.fixture
def systemctl(home: Path) -> Iterator[Callable[..., str]]:
    """`systemctl --user`, to a manager that has the units of deploy/systemd."""
    needs("systemd-analyze", "systemd")
    install(home / ".local/bin/ktrdr-orchestrator",
            f'exec {sys.executable} {PROGRAM} "$@"')
    units, folder = home / ".config/systemd/user", home / "manager"
    shutil.copytree(DEPLOY / "systemd", units)
    (units / "default.target").write_text("[Unit]\nDescription=Nothing else\n")
    (home / ".config/ktrdr-orchestrator.env").write_text(
        "".join(f"{k}={v}\n" for k, v in variables(home).items()))
    (folder / "xdg").mkdir(parents=True)
    (folder / "xdg").chmod(0o700)
    environ = {"HOME": str(home), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
               "XDG_RUNTIME_DIR": str(folder / "xdg")}

    def run(*args: str) -> str:
        done = subprocess.run(["systemctl", "--user", *args], env=environ, text=True,
                              capture_output=True, timeout=30, check=False)
        return (done.stdout + done.stderr).strip()

    with open(folder / "log", "wb") as log, subprocess.Popen(
            [*OWN, "--mount", "--cgroup", "sh", "-c", MANAGER, "sh",
             f"nights-{os.getpid()}"], cwd=folder, env=environ, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL) as manager:
        try:
            wait_for(lambda: (folder / "xdg/systemd/private").exists())
            yield run
        finally:
            manager.terminate()


def test_the_units_are_sound_and_the_timer_is_of_the_night(home: Path) -> None:
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze is not installed (Debian: apt install systemd)")
    install(home / ".local/bin/ktrdr-orchestrator", "")
    (home / "xdg").mkdir()
    units = [str(unit) for unit in sorted((DEPLOY / "systemd").iterdir())]
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", *units], capture_output=True, text=True,
        env={"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "xdg")}, check=False)
    assert done.returncode == 0 and not done.stderr
    told = re.findall(r"OnCalendar=(.+)", Path(units[1]).read_text())
    shown = subprocess.run(["systemd-analyze", "calendar", *told], capture_output=True,
                           text=True, check=True)
    assert "*-*-* 00..05,22,23:00/15:00" in shown.stdout


@pytest.mark.slow
def test_systemd_parks_goes_on_stops_at_once_and_fails_only_when_it_failed(
    home: Path, person: Program, systemctl: Callable[..., str],
) -> None:
    unit = "ktrdr-orchestrator"

    def schedule(when: str) -> None:
        folder = home / f".config/systemd/user/{unit}.timer.d"
        folder.mkdir(exist_ok=True)
        (folder / "other.conf").write_text(
            f"[Timer]\nOnCalendar=\nOnCalendar={when}\nAccuracySec=100ms\n")
        systemctl("daemon-reload")
        systemctl("restart", f"{unit}.timer")

    def ended() -> str:
        wait_for(lambda: systemctl("is-active", unit) in ("inactive", "failed"))
        shown = systemctl("show", "-p", "ExecMainStatus", "-p", "Result", unit)
        return " ".join(sorted(re.findall(r"=(.+)", shown)))

    schedule("*:*:0/2")
    wait_for(lambda: calls(person) == 1)
    assert ended() == "3 success"
    lock = home / "project/state/plan.lock"
    before = lock.stat().st_mtime_ns
    wait_for(lambda: lock.stat().st_mtime_ns > before)      # it was started again
    schedule("2099-01-01")
    assert ended() == "3 success" and calls(person) == 1

    resumed = person.start("resume", "plan.md", "--answer", "a")
    wait_for(lambda: is_hanging(home))
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=10)
    systemctl("start", unit)
    wait_for(lambda: calls(person) == 3)
    stopping = time.monotonic()
    systemctl("stop", unit)
    assert time.monotonic() - stopping < 10 and not person.alive()
    assert ended() == "130 success"
    systemctl("start", unit)
    assert ended() == "0 success"
    (home / "project/plan.md").unlink()
    systemctl("start", unit)
    assert ended() == "2 exit-code"


# ---- logrotate -----------------------------------------------------------------------

def test_the_log_is_rotated_under_a_run_without_losing_a_line(home: Path) -> None:
    needs("logrotate", "logrotate")
    home.chmod(0o700)
    log, config = home / "night.log", home / "rotate.conf"
    example = (DEPLOY / "logrotate/ktrdr-orchestrator").read_text()
    config.write_text(example.replace("/home/me", str(home)).replace(
        "su me me", "su root root"))
    config.chmod(0o644)

    def rotate() -> None:
        subprocess.run(["logrotate", "--force", "--state", home / "rotated", config],
                       check=True, capture_output=True, timeout=30)

    with open(log, "a") as running:
        running.write("before\n")
        running.flush()
        rotate()
        running.write("after\n")
    log.write_text("the next start\n")
    rotate()
    assert (home / "night.log.1").read_text() == "the next start\n"
    assert gzip.decompress((home / "night.log.2.gz").read_bytes()) == b"before\nafter\n"


# ---- with how little it works --------------------------------------------------------

def least(folder: Path, *args: str | Path, before: str = ":", redirected: str = "",
          ) -> subprocess.CompletedProcess[str]:
    """Run with no environment at all: no PATH, no HOME, no locale, no TERM."""
    argv = [sys.executable, str(PROGRAM), *map(str, args)]
    return subprocess.run(
        ["/bin/sh", "-c", f'{before}; exec "$@" {redirected}', "sh", *argv], cwd=folder,
        env={}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        check=False)


def local(folder: Path) -> tuple[str, ...]:
    """The scripted agent, kept out of the home that an empty environment leads to."""
    return *LOCAL[:-1], f"env CLAUDE_CONFIG_DIR={folder}/.c {LOCAL[-1]}"


@pytest.mark.parametrize("redirected", [
    "", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full",
    ">/dev/full 2>&1", "| true"])
def test_a_milestone_is_parked_with_an_empty_environment_whoever_reads(
    repository: Path, redirected: str,
) -> None:
    done = least(repository, "run", AMBIGUOUS, *local(repository),
                 redirected=redirected)
    assert "Traceback" not in done.stderr and "bug" not in done.stderr
    state = Program(repository).state("ambiguous_task")
    assert state["task_results"]["1.1"]["status"] == "needs_human"
    assert redirected == "| true" or done.returncode == ko.ExitCode.NEEDS_HUMAN


@pytest.mark.parametrize("redirected", ["", "<&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_a_milestone_is_done_with_an_empty_environment(
    repository: Path, redirected: str,
) -> None:
    done = least(repository, "run", HELLO, *local(repository), redirected=redirected)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert Program(repository).state("hello_world")["completed_tasks"] == ["1.1"]


@pytest.mark.parametrize("redirected", [">/dev/full", ">&-", "2>&-"])
def test_an_answer_that_cannot_be_written_is_told(
    repository: Path, redirected: str,
) -> None:
    done = least(repository, "status", redirected=redirected)
    assert done.returncode == (1 if "full" in redirected else 0)
    assert ("error: stdout: No space left" in done.stderr) is ("full" in redirected)
    assert "Traceback" not in done.stderr


def test_under_umask_077_nobody_else_reads_what_it_wrote(repository: Path) -> None:
    done = least(repository, "run", HELLO, *local(repository), before="umask 077")
    written = [repository / "state", *(repository / "state").rglob("*")]
    assert done.returncode == 0 and len(written) > 10
    assert [p for p in written if p.stat().st_mode & 0o077 and not p.is_symlink()] == []


@pytest.mark.parametrize("before", ["cd /proc", "mkdir d && cd d && rmdir ../d"],
                         ids=["not writable", "gone"])
def test_a_folder_that_takes_no_state_is_told(repository: Path, before: str) -> None:
    done = least(repository, "run", HELLO, *local(repository), before=before)
    assert done.returncode == ko.ExitCode.USAGE and not done.stdout
    error, hint = done.stderr.splitlines()
    assert "error: state/hello_world.lock: " in error and hint.startswith("  try: ")


# ---- a start with nothing to do ------------------------------------------------------

IDLE: dict[str, tuple[list[dict[str, Any]], ko.ExitCode, str]] = {
    "finished": ([{"write": "hello/hello.py", "content": "print('Hello, World!')\n"},
                  {"report": {"status": "completed", "summary": "Done."}}],
                 ko.ExitCode.OK, "the milestone is completed"),
    "parked": (ASKS["attempts"][0], ko.ExitCode.NEEDS_HUMAN, "1.1 asks: Where to?"),
    "waiting": ([{"limit": {"resets_in_s": 7200}}], ko.ExitCode.TRY_LATER,
                "start again after 2"),
    "running": ([{"hang": True}], ko.ExitCode.LOCKED, "is in use by PID")}


@pytest.mark.parametrize("name", IDLE)
def test_a_start_with_nothing_to_do_costs_no_call_and_half_a_second_at_most(
    repository: Path, name: str,
) -> None:
    steps, status, told = IDLE[name]
    program = Program(repository).scenarios({"hello_world/1.1": {"attempts": [steps]}})
    args = ("run", HELLO, *LOCAL, "--limit-wait", "60")
    first = program.start(*args)
    wait_for(lambda: len(program.calls()) == 1)
    if name != "running":
        first.communicate(timeout=20)
        assert first.returncode == status
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program.environ["PATH"] = str(repository)        # no git, no docker
    again = program.run(*args, "--sandbox", "docker")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert again.returncode == status and told in again.stderr
    assert not again.stdout and len(again.stderr.splitlines()) <= 2
    # of processor time: how long it takes beside other tests says little
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    first.terminate()
    first.communicate(timeout=20)
    assert len(program.calls()) == 1 and not program.alive()
