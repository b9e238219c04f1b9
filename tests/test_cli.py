"""Section 19: arguments, answers, exit status; what a person types and reads."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RECORDINGS, TEST_PLANS
from fakes import new_state
from program import LOCAL, PROGRAM, Program, Screen

import ktrdr_orchestrator as ko

HELLO = TEST_PLANS / "hello_world.md"
AMBIGUOUS = TEST_PLANS / "ambiguous_task.md"
PLAN = """\
# A plan

## Task 1.1: One

**Acceptance Criteria:**
- [ ] it is there

## Task 1.2: Two

## E2E Test

Look at it.
"""
CALLS = (
    {"milestone": "m", "run": "2026-01-01T10:00:00.000+00:00", "task": "1.1",
     "at": "2026-01-01T10:00:01.000+00:00", "status": "failed", "cost_usd": 0.1,
     "models": {"opus": {"cost_usd": 0.1}}},
    {"milestone": "m", "run": "2026-01-01T10:00:00.000+00:00", "task": "1.1",
     "at": "2026-01-02T10:00:01.000+00:00", "status": "completed", "cost_usd": 0.2,
     "models": {"opus": {"cost_usd": 0.15}, "haiku": {"cost_usd": 0.05}}},
    {"milestone": "n", "run": "2026-01-03T10:00:00.000+00:00", "task": "9",
     "at": "2026-01-03T10:00:01.000+00:00", "status": "interrupted", "cost_usd": 0.4},
)


class Cli:
    """The program inside this process, in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *args: str | Path) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        code = ko.main([str(arg) for arg in args])
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err

    def json(self, *args: str | Path) -> Any:
        code, out, _ = self(*args, "--json")
        assert code == 0
        return json.loads(out)

    def file(self, name: str, data: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    for name in os.environ:
        if name.startswith(("ORCHESTRATOR_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    handled = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM,
                                                signal.SIGHUP)}
    yield Cli(tmp_path, capsys)
    for number, handler in handled.items():
        signal.signal(number, handler)


def save(cli: Cli, plan: Path, **task: Any) -> ko.StateStore:
    """A state in which task 1.1 stands as `task` says."""
    parsed = ko.parse_plan(plan.read_text(), path=plan)
    store = ko.StateStore(cli.folder / "state", parsed.milestone, ko.Clock())
    state = new_state(parsed, ko.Clock())
    store.save(state.updated("1.1", title="One", sha256=parsed.tasks[0].sha256, **task))
    return store


def ledger(cli: Cli) -> None:
    wait = {"milestone": "n", "run": "r", "at": CALLS[-1]["at"], "kind": "outage_wait"}
    cli.file("state/ledger.jsonl",       # what is no call is not told
             "".join(json.dumps(line) + "\n" for line in (*CALLS, wait)))


# What is wrong is said in two lines, with what to do, and exit status 2.

BAD = {
    "no command": (),
    "an unknown command": ("walk",),
    "an unknown flag": ("run", "plan.md", "--fsat"),
    "a flag of another command": ("status", "--fresh"),
    "no plan": ("run",),
    "a plan that is not there": ("check", "none.md"),
    "a folder as plan": ("run", "folder"),
    "a binary plan": ("run", "binary"),
    "a plan without tasks": ("run", "empty.md"),
    "a value that is no number": ("check", "plan.md", "--max-turns", "many"),
    "a value below the limit": ("check", "plan.md", "--max-turns", "0"),
    "a sandbox that does not exist": ("check", "--sandbox", "cloud"),
    "a command with an open quote": ("check", "--claude", "'claude"),
    "an ini file that is not there": ("status", "--config", "none.ini"),
    "a folder as ini file": ("status", "--config", "folder"),
    "a binary ini file": ("status", "--config", "binary"),
    "an ini file without sections": ("status", "--config", "plan.md"),
    "an unknown ini key": ("status", "--config", "key.ini"),
    "an unknown ini section": ("status", "--config", "section.ini"),
    "an unknown task": ("task", "plan.md", "1.9"),
    "a transcript of an unknown task": ("logs", "plan.md", "1.9"),
    "a transcript of a task that did not run": ("logs", "plan.md", "1.1"),
    "the status of what never ran": ("status", "plan.md"),
    "resume of what never ran": ("resume", "plan.md"),
    "fetch of what never ran": ("fetch", "plan.md"),
    "two answers": ("resume", "plan.md", "--answer", "a", "--skip"),
    "an answer file that is not there": ("resume", "plan.md", "--answer-file", "none"),
    "a date that is none": ("costs", "--since", "yesterday"),
    "an unknown grouping": ("costs", "--by", "colour"),
    "a folder as stream": ("explain", "folder"),
    "a sandbox action that does not exist": ("sandbox", "fly"),
}


@pytest.mark.parametrize("args", BAD.values(), ids=BAD)
def test_what_cannot_be_is_told_with_a_way_out(cli: Cli, args: tuple[str, ...]) -> None:
    cli.file("plan.md", PLAN)
    cli.file("empty.md", "# Nothing to do\n")
    cli.file("binary", bytes(range(256)) * 40)
    cli.file("key.ini", "[orchestrator]\ncolour = red\n")
    cli.file("section.ini", "[orchestra]\nmax_turns = 1\n")
    (cli.folder / "folder").mkdir()
    code, out, err = cli(*args)
    assert code == ko.ExitCode.USAGE and not out
    assert re.search(r"^ktrdr-orchestrator: error: .", err, re.MULTILINE)
    assert re.search(r"^  try: .", err, re.MULTILINE) and "Traceback" not in err


def test_an_unknown_variable_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch,
                                      ) -> None:
    monkeypatch.setenv("ORCHESTRATOR_COLOUR", "red")
    code, _, err = cli("status")
    assert code == ko.ExitCode.USAGE and "ORCHESTRATOR_COLOUR" in err


def test_an_answer_without_a_question_is_an_error_and_changes_nothing(cli: Cli) -> None:
    plan = cli.file("plan.md", PLAN)
    store = save(cli, plan, status=ko.TaskStatus.PENDING)
    before = store.path.read_bytes()
    code, _, err = cli("resume", plan, "--answer", "yes", "--sandbox", "local")
    assert code == ko.ExitCode.USAGE and "no question is waiting" in err
    assert store.path.read_bytes() == before


def test_skip_needs_a_recommendation(cli: Cli) -> None:
    plan = cli.file("plan.md", PLAN)
    save(cli, plan, status=ko.TaskStatus.NEEDS_HUMAN, question=ko.Question("Which?"))
    code, _, err = cli("resume", plan, "--skip", "--sandbox", "local")
    assert code == ko.ExitCode.USAGE and "recommended nothing" in err


def test_a_damaged_state_is_told_and_left_alone(cli: Cli) -> None:
    path = cli.file("state/plan_state.json", "{")
    code, _, err = cli("status", cli.file("plan.md", PLAN))
    assert code == ko.ExitCode.USAGE and str(path.relative_to(cli.folder)) in err
    assert path.read_text() == "{"


# Answers.

def test_check_plan_prints_the_documented_object(cli: Cli) -> None:
    report = cli.json("check", cli.file("plan.md", PLAN))
    assert list(report) == ["path", "milestone", "title", "sha256", "branch", "tasks",
                            "e2e", "context", "warnings", "errors"]
    assert report["milestone"] == "plan" and report["title"] == "A plan"
    assert report["tasks"][0] == {
        "id": "1.1", "title": "One", "line": 3, "end_line": 6,
        "text": PLAN[10:PLAN.index("\n\n## Task 1.2")], "type": "", "files": [],
        "criteria": ["it is there"], "gates": [], "marked": False, "timeout_s": None,
        "model": ""}
    e2e = report["e2e"]
    assert e2e.keys() == report["tasks"][0].keys() | {"heading"}
    assert (e2e["id"], e2e["heading"], e2e["title"]) == ("e2e", "E2E Test", "E2E Test")
    assert report["errors"] == []


def test_check_of_a_bad_plan_prints_its_errors_and_exits_with_2(cli: Cli) -> None:
    code, out, _ = cli("check", cli.file("empty.md", "# Nothing\n"), "--json")
    assert code == ko.ExitCode.USAGE
    assert [list(error) for error in json.loads(out)["errors"]] == [
        ["line", "message", "hint"]]


def test_check_shows_a_person_every_task_and_problem(cli: Cli) -> None:
    code, out, _ = cli("check", cli.file("plan.md", PLAN))
    assert code == 0 and re.search(r"^ +1\.1 +One ", out, re.MULTILINE)
    assert "e2e:\n  id: e2e\n  title: E2E Test\n" in out
    _, out, _ = cli("check", cli.file("empty.md", "# Nothing\n"))
    assert re.search(r"errors:\n +line +message +hint\n +1 ", out)


def test_status_is_one_object_for_a_plan_and_a_list_without(cli: Cli) -> None:
    assert cli.json("status") == [] and "no milestones yet" in cli("status")[1]
    plan = cli.file("plan.md", PLAN)
    save(cli, plan, status=ko.TaskStatus.COMPLETED)
    (shown,) = cli.json("status")
    assert shown["milestone"] == "plan" and len(shown["tasks"]) == 1
    assert [t["id"] for t in cli.json("status", plan)["tasks"]] == ["1.1", "1.2", "e2e"]


def test_history_has_a_row_for_each_start_from_nothing(cli: Cli) -> None:
    ledger(cli)
    first, second, third = CALLS
    assert cli.json("history") == [
        {"milestone": "m", "started_at": first["run"], "calls": 2, "cost_usd": 0.3,
         "last_call_at": second["at"], "last_task": "1.1", "last_status": "completed"},
        {"milestone": "n", "started_at": third["run"], "calls": 1, "cost_usd": 0.4,
         "last_call_at": third["at"], "last_task": "9", "last_status": "interrupted"}]
    assert [row["milestone"] for row in cli.json(
        "history", "--since", third["at"][:10])] == ["n"]


@pytest.mark.parametrize(("by", "sums"), [
    ("milestone", {"m": 0.3, "n": 0.4}), ("task", {"m 1.1": 0.3, "n 9": 0.4}),
    ("model", {"opus": 0.25, "haiku": 0.05, "unknown": 0.4}),
    ("day", {"2026-01-01": 0.1, "2026-01-02": 0.2, "2026-01-03": 0.4})])
def test_costs_add_up_however_they_are_cut(cli: Cli, by: str, sums: dict[str, float],
                                           ) -> None:
    ledger(cli)
    report = cli.json("costs", "--by", by)
    assert report["total_usd"] == 0.7
    assert {row[by]: row["cost_usd"] for row in report[f"by_{by}"]} == sums


def test_costs_start_at_a_day_and_come_as_one_number(cli: Cli) -> None:
    ledger(cli)
    assert cli("costs", "--total", "--since", "2026-01-02")[1] == "0.60\n"


def test_damaged_lines_of_the_ledger_are_passed_over(cli: Cli) -> None:
    cli.file("state/ledger.jsonl", '{"milestone": 3, "models": 7}\n[1]\n{"cost_usd":')
    assert cli.json("costs", "--by", "model")["total_usd"] == 0
    assert cli("history")[0] == 0


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.*json")),
                         ids=lambda path: path.stem)
def test_every_recording_is_explained(cli: Cli, path: Path) -> None:
    report = cli.json("explain", path)
    assert list(report) == [
        "status", "rule", "evidence", "question", "outage", "cost_usd", "tokens",
        "models", "session_id", "turns", "ended", "exit_code", "duration_s", "events",
        "bad_lines", "stderr"]
    assert f"status: {report['status']}\n" in cli("explain", path)[1]


def test_logs_show_the_latest_attempt_of_exactly_that_task(cli: Cli) -> None:
    plan = cli.file("plan.md", PLAN)
    said = '{"type":"assistant","message":{"content":[{"type":"text","text":"%s"}]}}\n'
    for age, name in enumerate(("1.1-2", "1.1-1", "1.1-x-1", "e2e-1")):
        path = cli.file(f"state/plan/{name}.ndjson", said % f"I am {name}.")
        os.utime(path, (age, age))
    assert "I am e2e-1." in cli("logs", plan)[1]
    assert "I am 1.1-1." in cli("logs", plan, "1.1")[1]
    assert cli("logs", plan, "e2e", "--json")[1] == said % "I am e2e-1."


def test_the_ini_file_beside_the_state_is_read(cli: Cli) -> None:
    cli.file("orchestrator.ini", "[orchestrator]\nstate_dir = here\n")
    cli.file("here/ledger.jsonl", json.dumps(CALLS[2]) + "\n")
    assert cli("costs", "--total")[1] == "0.40\n"


def test_a_state_that_cannot_be_opened_is_told(cli: Cli) -> None:
    state = cli.folder / "state"
    state.mkdir()
    (state / "plan_state.json").symlink_to("plan_state.json")
    code, _, err = cli("status", cli.file("plan.md", PLAN))
    assert code == ko.ExitCode.USAGE and "plan_state.json" in err


def test_every_command_has_help(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "resume", "task", "check", "status", "history", "costs",
                    "logs", "explain", "fetch", "sandbox init", "sandbox shell"):
        with pytest.raises(SystemExit) as ended:
            ko.main([*command.split(), "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and len(shown) > 300, command


# The program as a process.

def bare(folder: Path, *args: str | Path, shell: str = "",
         ) -> subprocess.CompletedProcess[str]:
    """Run with nothing on PATH but git, and nothing in the environment."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    if not (tools / "git").exists():
        (tools / "git").symlink_to(str(shutil.which("git")))
    argv = [sys.executable, *map(str, args)]
    return subprocess.run(["/bin/sh", "-c", f'"$@" {shell}', "sh", *argv], text=True,
                          cwd=folder, env={"PATH": str(tools)}, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=60, check=False)


@pytest.mark.contract
def test_check_plan_needs_neither_docker_nor_claude(tmp_path: Path) -> None:
    done = bare(tmp_path, PROGRAM, "check", HELLO, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["milestone"] == "hello_world"
    assert not done.stderr and not (tmp_path / "state").exists()


@pytest.mark.contract
def test_check_without_docker_says_what_is_missing_and_where_settings_come_from(
    tmp_path: Path,
) -> None:
    done = bare(tmp_path, PROGRAM, "check", "--json", "--max-turns", "7")
    assert done.returncode == ko.ExitCode.SANDBOX
    report = json.loads(done.stdout)
    assert list(report) == ["probes", "settings", "telemetry"]
    assert {p["name"]: p["ok"] for p in report["probes"]} == {
        "git": True, "engine": False, "claude in the sandbox": False,
        "repository in the sandbox": False, "volumes in the sandbox": False,
        "API from the sandbox": False}
    settings = report["settings"]
    assert {"name": "max_turns", "value": 7, "source": "--max-turns"} in settings
    assert {"name": "state_dir", "value": "state", "source": "default"} in settings


@pytest.mark.contract
@pytest.mark.parametrize("action", ["init", "up", "reset", "shell", "claude", "status",
                                    "down"])
def test_a_sandbox_without_docker_is_an_error_not_a_bug(tmp_path: Path, action: str,
                                                        ) -> None:
    done = bare(tmp_path, PROGRAM, "sandbox", action)
    assert done.returncode == ko.ExitCode.SANDBOX
    assert "docker" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.contract
def test_help_imports_no_telemetry(tmp_path: Path) -> None:
    done = bare(tmp_path, "-X", "importtime", PROGRAM, "--help")
    assert done.returncode == 0 and "Exit status:" in done.stdout
    assert "opentelemetry" not in done.stderr and "asyncio" not in done.stderr
    assert "ktrdr-orchestrator run plan.md" in done.stdout


@pytest.mark.contract
@pytest.mark.parametrize("args", [
    ("check", HELLO),
    ("check", "--json"), ("logs", HELLO, "--json"),
    ("explain", RECORDINGS / "structured.ndjson")],
    ids=lambda args: " ".join(Path(arg).name for arg in args))
def test_a_closed_stdout_is_no_news(tmp_path: Path, args: tuple[str | Path, ...],
                                    ) -> None:
    logs = tmp_path / "state" / "hello_world"
    logs.mkdir(parents=True)
    shutil.copy(RECORDINGS / "structured.ndjson", logs / "1.1-1.ndjson")
    assert not bare(tmp_path, PROGRAM, *args, shell="| true").stderr


@pytest.mark.contract
def test_an_answer_survives_a_sandbox_that_cannot_be_used(tmp_path: Path) -> None:
    cli = Cli(tmp_path, None)  # type: ignore[arg-type]  # for its files only
    plan = cli.file("plan.md", PLAN)
    store = save(cli, plan, status=ko.TaskStatus.NEEDS_HUMAN,
                 question=ko.Question("Which?", ("red", "blue"), "blue"))
    done = bare(tmp_path, PROGRAM, "resume", plan, "--answer=a", "--sandbox=docker")
    state = store.load()
    assert done.returncode == ko.ExitCode.SANDBOX
    assert state and state.record("1.1").answer == "red"


@pytest.mark.contract
@pytest.mark.parametrize("answer", [("--answer=2",), ("--skip",), ("--answer-file=f",)],
                         ids=lambda answer: answer[0])
def test_a_parked_question_is_answered(tmp_path: Path, answer: tuple[str, ...]) -> None:
    program = Program(tmp_path)
    (tmp_path / "f").write_text("b\n")
    parked = program.run("run", AMBIGUOUS, *LOCAL)
    assert parked.returncode == ko.ExitCode.NEEDS_HUMAN
    assert f"resume --answer TEXT {AMBIGUOUS}" in parked.stdout
    assert program.run("resume", AMBIGUOUS, *answer, *LOCAL).returncode == 0
    again = program.run("run", AMBIGUOUS)
    assert again.returncode == 0 and "--fresh starts over" in again.stderr


@pytest.mark.contract
def test_fetch_brings_the_branch_and_writes_nothing_else(
    tmp_path: Path, repository: Path,
) -> None:
    program = Program(tmp_path)
    assert program.run("run", HELLO, *LOCAL, "--repo", repository).returncode == 0

    def refs() -> list[str]:
        argv = ["git", "for-each-ref", "--format=%(refname)"]
        shown = subprocess.run(argv, cwd=repository, text=True, capture_output=True,
                               check=True)
        return shown.stdout.split()

    before = refs()
    assert program.run("fetch", HELLO, "--repo", repository).returncode == 0
    assert sorted({*refs()} - {*before}) == ["refs/heads/orchestrator/hello_world"]
    assert not (repository / ".git" / "FETCH_HEAD").exists()
    assert not list((tmp_path / "state/hello_world").glob("*.bundle"))
    done = program.run("fetch", HELLO, "--repo", tmp_path)
    assert done.returncode == ko.ExitCode.USAGE and "--into" in done.stderr


@pytest.mark.contract
@pytest.mark.parametrize("has_gh", [True, False], ids=["gh", "no gh"])
def test_a_pull_request_tells_state_and_verdicts(
    tmp_path: Path, repository: Path, has_gh: bool,
) -> None:
    for argv in (["init", "-q", "--bare", tmp_path / "o"],
                 ["-C", repository, "remote", "add", "origin", tmp_path / "o"]):
        subprocess.run(["git", *argv], check=True)
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text(f"#!/bin/sh\n{'echo made: $*; cat' if has_gh else 'exit 1'}\n")
    gh.chmod(0o755)
    program = Program(tmp_path, PATH=f"{gh.parent}:{os.environ['PATH']}")
    done = program.run("run", HELLO, *LOCAL, "--repo", repository, "--create-pr")
    assert done.returncode == 0 and "state:\n" in done.stdout
    assert re.search(r"^ +1\.1 +completed", done.stdout, re.MULTILINE)
    assert re.search(r"verdicts:\s+1\.1: \w", done.stdout)
    assert ("made: pr create --head orchestrator/hello_world" in done.stdout) is has_gh
    assert ("warning: no pull request was made" in done.stderr) is not has_gh


@pytest.mark.contract
def test_logs_follow_a_running_attempt_to_its_end(tmp_path: Path) -> None:
    program = Program(tmp_path).scenarios({"hello_world/1.1": {"attempts": [[
        {"bash": "echo one"}, {"sleep": 1.0}, {"write": "hello/hello.py",
         "content": "print('Hello, World!')\n"}, {"report": {
             "status": "completed", "summary": "done"}}]]}})
    run = program.start("run", HELLO, *LOCAL)
    transcript = tmp_path / "state/hello_world/1.1-1.ndjson"
    deadline = time.monotonic() + 20
    while not transcript.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    followed = program.run("logs", HELLO, "--follow", timeout_s=20)
    assert run.wait(20) == 0 and followed.returncode == 0
    assert "echo one" in followed.stdout
    assert "StructuredOutput completed" in followed.stdout
    run.communicate()


@pytest.mark.contract
@pytest.mark.parametrize("reply", ["\n", "n\n"], ids=["yes", "no"])
def test_on_a_terminal_an_unfinished_run_is_asked_about(tmp_path: Path, reply: str,
                                                        ) -> None:
    program = Program(tmp_path)
    assert program.run("run", AMBIGUOUS, *LOCAL).returncode == 3
    with Screen(program, "run", AMBIGUOUS, *LOCAL) as screen:
        screen.reply("Resume from Task 1.1? [Y/n] ", reply)
        screen.reply("later: ", "later\n")
        assert screen.end() == ko.ExitCode.NEEDS_HUMAN
    assert ("the earlier run was moved to" in screen.text) is (reply == "n\n")
    assert len(list(tmp_path.glob("state/archive/*"))) == (reply == "n\n")


@pytest.mark.contract
def test_an_interrupted_prompt_ends_at_once_and_says_so(tmp_path: Path) -> None:
    program = Program(tmp_path)
    assert program.run("run", AMBIGUOUS, *LOCAL).returncode == 3
    with Screen(program, "run", AMBIGUOUS, *LOCAL) as screen:
        screen.reply("[Y/n] ", "\x03")
        assert screen.end() == ko.ExitCode.INTERRUPTED
    assert "Traceback" not in screen.text
