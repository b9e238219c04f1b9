"""sandbox/supervise.py with real processes, on this machine, without Docker."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SUPERVISE = Path(__file__).parents[1] / "sandbox" / "supervise.py"
DEADLINE_S = 20.0

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(sys.platform != "linux", reason="runs in the sandbox: Linux"),
]

# Ways to outlive whoever started you. `animal` leaves a file named after its PID in the
# den, since an environment variable could be taken from it.
ZOO = {
    "in the background": "animal &",
    "nohup": "nohup animal &",
    "a session of its own": "setsid animal &",
    "a double fork": "(setsid animal &)",
    "an empty environment": "setsid env -i $(command -v animal) &",
    "deaf to TERM and INT": "(trap '' TERM INT HUP QUIT; animal) &",
    "stopped": "animal & until [ -e den/$! ]; do sleep 0.01; done; kill -STOP $!",
    "children of its own": "setsid sh -c 'animal & animal & wait' &",
}
ALWAYS_ANOTHER_PID = """
import os, pathlib, time
while True:
    pathlib.Path("beat").touch()
    time.sleep(0.002)
    if os.fork():
        os._exit(0)
    os.setsid()
"""


class Supervised:
    """A running supervise.py; its stdin stays open until `let_go`."""

    def __init__(self, script: str, den: Path, prompt: bytes, key: bytes) -> None:
        self.den = den
        path = f"{den.parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, str(SUPERVISE), "--", "sh", "-c", script],
            env={**os.environ, "PATH": path}, cwd=den.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(b"prompt=%d ANTHROPIC_API_KEY=%d\n%s%s" % (
            len(prompt), len(key), prompt, key))
        self.process.stdin.flush()

    def animals(self) -> set[int]:
        return {int(path.name) for path in self.den.iterdir()}

    def survivors(self) -> set[int]:
        return {pid for pid in self.animals() if is_alive(pid)}

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None  # communicate() minds a closed one

    def status(self) -> int:
        return self.process.wait(DEADLINE_S)

    def output(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def clean_up(self) -> None:
        try:
            self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for pid in self.survivors():
            os.kill(pid, signal.SIGKILL)


Start = Callable[..., Supervised]


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def processor_ticks(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return sum(map(int, stat.rpartition(")")[2].split()[11:13]))


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a shell script under supervision; kills what a failed test leaves."""
    den = tmp_path / "den"
    den.mkdir()
    animal = tmp_path / "animal"
    animal.write_text(f"#!/bin/sh\n: >{den}/$$\nexec sleep 600\n", encoding="utf-8")
    animal.chmod(0o755)
    started: list[Supervised] = []

    def starter(script: str, *, prompt: bytes = b"", key: bytes = b"") -> Supervised:
        started.append(Supervised(script, den, prompt, key))
        return started[-1]

    yield starter
    for supervised in started:
        supervised.clean_up()


def run_raw(stdin: bytes, *argv: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, str(SUPERVISE), *argv], input=stdin,
                          capture_output=True, timeout=DEADLINE_S, check=False)


def test_the_command_reads_the_prompt_and_then_the_end_of_its_input(
        start: Start) -> None:
    prompt = "line 1\nübung ✓\n".encode() * 20_000
    supervised = start("cat", prompt=prompt)
    assert supervised.output() == prompt
    assert supervised.status() == 0


def test_a_command_that_never_reads_a_large_prompt_is_not_in_the_way(
        start: Start) -> None:
    assert start("exit 3", prompt=b"x" * 1_000_000).status() == 3


@pytest.mark.parametrize(("script", "status"), [
    ("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_the_exit_status_is_that_of_the_command(
        start: Start, script: str, status: int) -> None:
    assert start(script).status() == status


@pytest.mark.parametrize("escape", ZOO.values(), ids=ZOO)
def test_nothing_outlives_a_command_that_exits(start: Start, escape: str) -> None:
    supervised = start(f"{escape}\nuntil ls den/*; do sleep 0.01; done; exit 7")
    assert supervised.status() == 7
    assert supervised.animals() and supervised.survivors() == set()


@pytest.mark.parametrize("escape", ZOO.values(), ids=ZOO)
def test_nothing_outlives_the_end_of_stdin(start: Start, escape: str) -> None:
    supervised = start(f"{escape}\nexec sleep 600")
    wait_until(lambda: bool(supervised.survivors()))
    supervised.let_go()
    assert supervised.status() == 125
    assert supervised.survivors() == set()


def test_a_command_that_ignores_every_request_is_killed_after_its_last_words(
        start: Start) -> None:
    supervised = start("trap '' INT TERM HUP; animal; animal")
    wait_until(lambda: bool(supervised.survivors()))
    began = time.monotonic()
    supervised.let_go()
    assert supervised.status() == 125
    assert 2.9 < time.monotonic() - began < 6
    assert supervised.survivors() == set()


def test_last_words_after_a_stop_are_still_delivered(start: Start) -> None:
    supervised = start("trap 'echo result; exit 0' INT; animal & wait")
    wait_until(lambda: bool(supervised.survivors()))
    supervised.let_go()
    assert supervised.output() == b"result\n"
    assert supervised.status() == 125


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_is_an_order_to_stop(
        start: Start, order: signal.Signals) -> None:
    supervised = start("setsid animal & wait")
    wait_until(lambda: bool(supervised.survivors()))
    supervised.process.send_signal(order)
    assert supervised.status() == 125
    assert supervised.survivors() == set()


def test_a_background_process_that_holds_stdout_does_not_delay_the_end(
        start: Start) -> None:
    supervised = start("setsid animal & echo done")
    began = time.monotonic()
    assert supervised.output() == b"done\n"
    assert time.monotonic() - began < 5


def test_a_process_that_changes_its_pid_all_the_time_is_caught(
        start: Start, tmp_path: Path) -> None:
    (tmp_path / "hopper.py").write_text(ALWAYS_ANOTHER_PID, encoding="utf-8")
    assert start(f"{sys.executable} hopper.py & sleep 0.3").status() == 0
    (tmp_path / "beat").unlink()  # was written, and is not written any more
    time.sleep(0.1)
    assert not (tmp_path / "beat").exists()


def test_zombies_are_reaped_while_the_command_runs(start: Start) -> None:
    supervised = start("(setsid true &); exec animal")
    wait_until(lambda: bool(supervised.survivors()))
    children = Path(f"/proc/{supervised.process.pid}/task/"
                    f"{supervised.process.pid}/children")
    wait_until(lambda: len(children.read_text(encoding="utf-8").split()) == 1)


@pytest.mark.parametrize("stdin", [b"", b"no length\n", b"prompt=5", b"prompt=9\nshort",
                                   b"prompt=1 HOME=1\nab"])
def test_without_a_whole_prompt_nothing_is_started(
        stdin: bytes, tmp_path: Path) -> None:
    ended = run_raw(stdin, "--", "touch", str(tmp_path / "started"))
    assert ended.returncode == 125
    assert b"supervise: stdin: " in ended.stderr
    assert not (tmp_path / "started").exists()


def test_a_command_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    missing = run_raw(b"prompt=0\n", "--", "no-such-command")
    assert (missing.returncode, missing.stderr) == (
        127, b"supervise: no-such-command: not found\n")
    directory = run_raw(b"prompt=0\n", "--", str(tmp_path))
    assert directory.returncode == 126
    assert b"Permission denied" in directory.stderr


def test_a_key_comes_by_descriptor_and_is_in_no_environment(start: Start) -> None:
    supervised = start('cat <&"$CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR"; echo; env; '
                       'tr "\\0" "\\n" </proc/$PPID/environ', key=b"secret")
    shown = supervised.output()
    assert shown.startswith(b"secret\n") and b"PATH=" in shown
    assert shown.count(b"secret") == 1


def test_a_wrong_call_shows_the_usage() -> None:
    assert b"usage: supervise.py -- COMMAND" in run_raw(b"", "claude").stderr


def test_waiting_costs_no_processor_time(start: Start) -> None:
    supervised = start("exec animal")
    wait_until(lambda: bool(supervised.survivors()))
    before = processor_ticks(supervised.process.pid)
    time.sleep(0.3)
    assert processor_ticks(supervised.process.pid) - before <= 1  # of 30
