"""Section 12: what is on the disk survives crashes, damage, full disks and crowds."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, missing
from fakes import FakeClock

import ktrdr_orchestrator as ko

CLOCK = ko.Clock()
ATTEMPT = ko.Attempt(1, "2030-01-01T00:00:00+00:00", 1.5, "exit", "completed",
                     "structured", "done", "s-1", 3, 0.25)
STATE = ko.RunState(
    "m1", "plan.md", "ab" * 32, "orchestrator/m1", "local", "2030-01-01T00:00:00+00:00",
    base="0" * 40, head="1" * 40, cost_usd=0.25, in_flight="1.3",
    wait=ko.Wait("overloaded", "2030-01-01T00:05:00+00:00"),
    tasks={"1.1": ko.TaskRecord("One", "cd" * 32, ko.TaskStatus.COMPLETED, 1,
                                (ATTEMPT,), checkpoint="1" * 40),
           "1.2": ko.TaskRecord("Two", "ef" * 32, ko.TaskStatus.NEEDS_HUMAN, 1, (),
                                ko.Question("Which?", ("a", "b"), "a")),
           "1.3": ko.TaskRecord("Three", status=ko.TaskStatus.FAILED, started=3),
           "e2e": ko.TaskRecord("E2E Test", status=ko.TaskStatus.RUNNING, started=1)})


def store(folder: Path) -> ko.StateStore:
    return ko.StateStore(folder, "m1", CLOCK)


def python(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = store(tmp_path).save(STATE)
    assert store(tmp_path).load() == saved
    assert saved.updated_at


def test_the_file_is_json_as_jq_users_expect_it(tmp_path: Path) -> None:
    store(tmp_path).save(STATE)
    raw = json.loads((tmp_path / "m1_state.json").read_text())
    assert raw["version"] == ko.STATE_VERSION
    assert raw["completed_tasks"] == ["1.1"]
    assert raw["failed_tasks"] == ["1.3"]
    assert raw["task_attempt_counts"] == {"1.1": 1, "1.2": 1, "1.3": 3, "e2e": 1}
    assert raw["e2e_status"] == "running"
    assert raw["task_results"]["1.1"]["attempts"][0]["cost_usd"] == 0.25


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert store(tmp_path).load() is None


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}', b'{"version": []}'])
def test_a_damaged_state_is_an_error_and_stays_as_it_is(
    tmp_path: Path, damage: bytes,
) -> None:
    path = tmp_path / "m1_state.json"
    path.write_bytes(damage)
    with pytest.raises(ko.StateError, match="m1_state.json"):
        store(tmp_path).load()
    assert path.read_bytes() == damage


@pytest.mark.parametrize("cut", range(3, 900, 23))
def test_a_torn_state_is_an_error_never_a_shorter_one(tmp_path: Path, cut: int) -> None:
    store(tmp_path).save(STATE)
    path = tmp_path / "m1_state.json"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ko.StateError):
        store(tmp_path).load()


def test_a_newer_state_is_refused_with_both_versions_named(tmp_path: Path) -> None:
    store(tmp_path).save(STATE)
    path = tmp_path / "m1_state.json"
    ours = ko.STATE_VERSION
    path.write_text(path.read_text().replace(f'"version": {ours}', '"version": 99'))
    with pytest.raises(ko.StateError, match=f"99.*{ours}"):
        store(tmp_path).load()


def test_a_save_costs_the_same_in_a_long_plan(tmp_path: Path) -> None:
    def cost(tasks: int) -> float:
        state = STATE
        for n in range(tasks):
            state = state.updated(f"9.{n}", title="x" * 80, attempts=(ATTEMPT,) * 3)
        here = store(tmp_path)
        state = here.save(state)
        begun = time.process_time()
        for n in range(20):
            state = here.save(state.updated("1.1", started=n))
        return (time.process_time() - begun) / 20

    assert cost(500) < cost(3) + 0.004


def test_archiving_moves_state_and_transcripts_aside(tmp_path: Path) -> None:
    here = store(tmp_path)
    here.save(STATE)
    here.new_transcript("1.1", 1).parent.mkdir()
    here.new_transcript("1.1", 1).write_text("{}")
    target = here.archive()
    assert target and here.load() is None and not here.folder.exists()
    assert (target / "m1_state.json").exists()
    assert (target / "m1" / "1.1-1.ndjson").exists()
    assert here.archive() is None


@pytest.mark.contract
def test_a_full_disk_is_an_error_and_the_state_before_is_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],
                      check=False, capture_output=True).returncode:
        missing("mounting a small file system is not allowed here")
    try:
        here = store(disk)
        saved = here.save(STATE)
        ledger = ko.Ledger(disk / "ledger.jsonl")
        ledger.append(STATE, "", n=1)
        (disk / "filler").write_bytes(b"x" * 40_000)
        big = STATE.updated("1.9", reason="y" * 200_000)
        with pytest.raises(ko.StateError, match="No space left"):
            here.save(big)
        assert store(disk).load() == saved
        with pytest.raises(ko.StateError, match="No space left"):
            ledger.append(STATE, "", text="z" * 200_000)
        (disk / "filler").unlink()
        ledger.append(STATE, "", n=2)
        assert [e.get("n") for e in ledger.entries()] == [1, 2]
        assert here.save(STATE) and store(disk).load()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_torn_last_line_of_the_ledger_costs_that_line_only(tmp_path: Path) -> None:
    ledger = ko.Ledger(tmp_path / "ledger.jsonl")
    ledger.append(STATE, "", n=1)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"n": 2, "mi')
    ledger.append(STATE, "", n=3)
    assert [entry["n"] for entry in ledger.entries()] == [1, 3]


def test_a_missing_ledger_has_no_entries(tmp_path: Path) -> None:
    assert list(ko.Ledger(tmp_path / "ledger.jsonl").entries()) == []


@pytest.mark.contract
def test_fifty_writers_lose_no_line_of_the_ledger(tmp_path: Path) -> None:
    code = ("import sys, pathlib, ktrdr_orchestrator as ko\n"
            "ledger = ko.Ledger(pathlib.Path(sys.argv[1]))\n"
            "state = ko.RunState('m', '', '', '', '', '')\n"
            "for n in range(20): ledger.append(state, '', who=sys.argv[2], n=n)")
    writers = [python(code, str(tmp_path / "l.jsonl"), str(n)) for n in range(10)]
    assert all(writer.wait(60) == 0 for writer in writers)
    entries = list(ko.Ledger(tmp_path / "l.jsonl").entries())
    assert len({(e["who"], e["n"]) for e in entries}) == 200


def test_a_lock_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "m1.lock"
    with ko.run_lock(path, FakeClock()):
        assert json.loads(path.read_text()) == ko.lock_owner(path) == {
            "pid": os.getpid(), "host": os.uname().nodename,
            "start": "2030-01-01T00:00:00.000+00:00"}
        with pytest.raises(ko.LockHeldError, match=f"PID {os.getpid()} on "), \
                ko.run_lock(path, FakeClock()):
            pass
        assert ko.lock_owner(path)
    assert not ko.lock_owner(path) and path.read_text() == ""


@pytest.mark.parametrize("content", [
    "", "{", "null", '{"pid": 1}', '{"pid": "x", "start": "", "host": ""}',
    '{"pid": 1, "start": "2029-12-31", "host": "elsewhere"}'])
def test_a_lock_file_that_nobody_holds_is_free_whatever_it_says(
    tmp_path: Path, content: str,
) -> None:
    path = tmp_path / "m1.lock"
    path.write_text(content)
    with ko.run_lock(path, FakeClock()):
        assert (ko.lock_owner(path) or {})["pid"] == os.getpid()


def test_a_dead_owner_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m1.lock"
    path.write_text(json.dumps({"pid": 2 ** 22 + 1, "host": os.uname().nodename}))
    assert ko.lock_owner(path) is None


CONTENDER = """
import pathlib, sys, time, ktrdr_orchestrator as ko
path, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
for line in sys.stdin:
    try:
        with ko.run_lock(path, ko.Clock()):
            with log.open("a") as file: file.write("in\\n")
            time.sleep(0.01)
            with log.open("a") as file: file.write("out\\n")
        print("owned", flush=True)
    except ko.LockHeldError:
        print("refused", flush=True)
"""


@pytest.mark.contract
@pytest.mark.slow
def test_two_hundred_rounds_of_eight_contenders_never_have_two_owners(
    tmp_path: Path,
) -> None:
    path, log = tmp_path / "m1.lock", tmp_path / "log"
    crowd = [subprocess.Popen([sys.executable, "-c", CONTENDER, path, log], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
             for _ in range(8)]
    try:
        for _ in range(200):
            path.write_text('{"pid": 1}')        # left behind by a dead owner
            log.write_text("")
            for contender in crowd:
                assert contender.stdin
                contender.stdin.write("go\n")
                contender.stdin.flush()
            said = [c.stdout.readline().strip() for c in crowd if c.stdout]
            assert "owned" in said
            entered = log.read_text().split()
            assert entered == ["in", "out"] * said.count("owned")
    finally:
        for contender in crowd:
            contender.kill()
            contender.wait()
