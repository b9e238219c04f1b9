"""What a person is asked, and what nobody can do: ambiguous_task.md, doomed_to_fail.md.

At a terminal and without one, by the scripted agent and by the real CLI in Docker.
"""
from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from boxes import AgentBox, agent_box
from conftest import TEST_PLANS
from program import LOCAL, Program, Screen

AMBIGUOUS = TEST_PLANS / "ambiguous_task.md"
DOOMED = TEST_PLANS / "doomed_to_fail.md"
MEMORY = "In memory: fast, gone after a restart"
FILE = "In a file: survives a restart, one process only"
SQLITE = "In SQLite: survives a restart, shared by processes"
QUESTION = f"""\
Task 1.1 asks: Where should quotes be kept?
  a) {MEMORY}
  b) {FILE}
  c) {SQLITE}
  recommended: {MEMORY}
"""
ASKED = f"{QUESTION}Answer, letter, Enter or skip (as recommended), later: "
AGAIN = "Resume from Task 1.1? [Y/n] "
ASKS = json.loads((TEST_PLANS / "scenarios.json").read_text())[
    "ambiguous_task/1.1"]["attempts"][0]
CTRL_C, CTRL_D, HANG_UP = "\x03", "\x04", ""
Replies = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """A project, its sandbox, and a look into that."""
    program: Program
    inside: Callable[[Path, str], str]       # a milestone's workspace
    running: Callable[[], Sequence[object]]
    prompts: Callable[[str], list[str]]      # of a session

    def run(self, *args: str | Path) -> tuple[int, str]:
        """Without a terminal: exit status, and all that was said."""
        done = self.program.run(*args)
        return done.returncode, done.stdout + done.stderr

    def on_screen(self, *args: str | Path, replies: Replies = ()) -> tuple[int, str]:
        """The same on a terminal, where each prompt gets its reply."""
        with Screen(self.program, *args) as screen:
            for prompt, keys in replies:
                screen.reply(prompt, keys)
                if keys == HANG_UP:
                    screen.hang_up()
            return screen.end(), screen.text

    def calls(self, plan: Path) -> list[dict[str, Any]]:
        """The agent's, in the milestone's latest run."""
        began = self.program.state(plan.stem)["started_at"]
        lines = (self.program.cwd / "state/ledger.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines)
                if line["run"] == began and "kind" not in line]

    def is_done(self, answer: str, told: str) -> None:
        """All that must hold when the agent went on with that answer."""
        record = self.program.state(AMBIGUOUS.stem)["task_results"]["1.1"]
        assert (record["status"], record["answer"]) == ("completed", answer)
        first, second = self.calls(AMBIGUOUS)
        assert (first["status"], second["status"]) == ("needs_human", "completed")
        assert first["session_id"] == second["session_id"]
        begun, answered = self.prompts(first["session_id"])
        assert begun.startswith("Task 1.1 of milestone ambiguous_task:")
        assert f"A person answered your question:\n\n{answer}\n\n" in answered
        assert "gate `python3 -B -c" in told and "`: exit 0" in told
        assert self.inside(AMBIGUOUS, "git log --format=%s; git status -s; ls quotes") \
            == "Task 1.1: Add a cache for quotes\nOne\ncache.py"
        self.is_free(AMBIGUOUS)

    def is_free(self, plan: Path) -> None:
        """Nothing of a run is left."""
        assert not self.running()
        assert (self.program.cwd / f"state/{plan.stem}.lock").read_text() == ""


def locally(program: Program) -> Place:
    program.environ |= {"ORCHESTRATOR_SANDBOX": "local",
                        "ORCHESTRATOR_CLAUDE": LOCAL[-1]}

    def inside(plan: Path, script: str) -> str:
        return subprocess.run(["sh", "-c", script], cwd=program.workspace(plan.stem),
                              check=True, capture_output=True, text=True).stdout.strip()

    return Place(program, inside, program.alive,
                 lambda session: [call["prompt"] for call in program.calls()])


def in_docker(box: AgentBox) -> Place:
    def prompts(session: str) -> list[str]:
        kept = box.inside(f"cat ~/.claude/projects/-workspace/{session}.jsonl")
        entries = map(json.loads, kept.splitlines())
        said = [entry["message"]["content"] for entry in entries
                if entry["type"] == "user"]
        return [text for text in said if isinstance(text, str)]

    return Place(box.program, lambda plan, script: box.inside(script), box.running,
                 prompts)


@pytest.fixture(scope="module")
def box(docker_engine: str, tmp_path_factory: pytest.TempPathFactory,
        ) -> Iterator[AgentBox]:
    with agent_box(tmp_path_factory.mktemp("asking"), "ktrdr-asking") as made:
        yield made


@pytest.fixture
def place(request: pytest.FixtureRequest, repository: Path) -> Place:
    if request.param == "docker":
        return in_docker(request.getfixturevalue("box"))
    return locally(Program(repository))


HERE = pytest.param("local", marks=pytest.mark.contract)
THERE = pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.slow])
here = pytest.mark.parametrize("place", [HERE], indirect=True)
everywhere = pytest.mark.parametrize("place", [HERE, THERE], indirect=True)


# ---- ambiguous_task.md ---------------------------------------------------------------

@everywhere
def test_a_question_is_asked_on_the_terminal_and_its_answer_goes_on_at_once(
    place: Place,
) -> None:
    status, told = place.on_screen("run", AMBIGUOUS, "--fresh",
                                   replies=[(ASKED, "b\n")])
    assert status == 0, told
    place.is_done(FILE, told)


@here
@pytest.mark.parametrize(("line", "answer"), [
    ("C)", SQLITE), ("2", FILE), ("skip", MEMORY), ("", MEMORY),
    ("Redis at a caf\udce9, and ask no more", "Redis at a caf\ufffd, and ask no more")],
    ids=["letter", "number", "skip", "empty", "words"])
def test_an_answer_that_is_typed_is_understood(
    place: Place, line: str, answer: str,
) -> None:
    status, told = place.on_screen("run", AMBIGUOUS, replies=[(ASKED, f"{line}\n")])
    assert status == 0, told
    place.is_done(answer, told)


@everywhere
def test_who_leaves_the_prompt_leaves_nothing_else_and_is_asked_at_the_next_start(
    place: Place,
) -> None:
    assert place.run("run", AMBIGUOUS, "--fresh")[0] == 3
    for keys, status in ("later\n", 3), (CTRL_D, 3), (CTRL_C, 130), (HANG_UP, 143):
        left, told = place.on_screen(
            "run", AMBIGUOUS, replies=[(AGAIN, "\n"), (ASKED, keys)])
        assert left == status and "Traceback" not in told
        place.is_free(AMBIGUOUS)
    assert len(place.calls(AMBIGUOUS)) == 1
    status, told = place.on_screen(
        "run", AMBIGUOUS, replies=[(AGAIN, "\n"), (ASKED, "c\n")])
    assert status == 0, told
    place.is_done(SQLITE, told)


@everywhere
def test_without_a_terminal_a_question_is_parked_until_it_is_answered(
    place: Place,
) -> None:
    parked, told = place.run("run", AMBIGUOUS, "--fresh")
    assert parked == 3 and QUESTION in told
    again, told = place.run("run", AMBIGUOUS)
    assert again == 3 and "task 1.1 asks: Where should quotes be kept?" in told
    assert QUESTION.strip() in place.run("status", AMBIGUOUS)[1]
    shown = json.loads(place.run("status", AMBIGUOUS, "--json")[1])
    assert (shown["status"], shown["tasks"][0]["question"]) == ("needs_human", {
        "text": "Where should quotes be kept?", "options": [MEMORY, FILE, SQLITE],
        "recommendation": MEMORY})
    assert len(place.calls(AMBIGUOUS)) == 1
    answered, told = place.run("resume", AMBIGUOUS, "--answer", "b")
    assert answered == 0, told
    place.is_done(FILE, told)


@here
@pytest.mark.parametrize(("args", "answer"), [
    (("--answer", "In a file, please"), "In a file, please"),
    (("--answer-file", "answer.txt"), "In a file.\nWhich one I leave to you."),
    (("--skip",), MEMORY), (("--on-question", "recommend"), MEMORY)],
    ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_parked_question_is_answered_in_each_of_the_ways(
    place: Place, args: tuple[str, ...], answer: str,
) -> None:
    (place.program.cwd / "answer.txt").write_text(f"{answer}\n")
    assert place.run("run", AMBIGUOUS)[0] == 3
    status, told = place.run("resume", AMBIGUOUS, *args)
    assert status == 0, told
    place.is_done(answer, told)


@here
def test_what_was_typed_before_the_question_is_no_answer(place: Place) -> None:
    place.program.scenarios({"ambiguous_task/1.1": {"attempts": [
        [{"sleep": 1}, *ASKS]]}})
    begun = "Task 1.1: Add a cache for quotes (attempt 1 of 3)"
    status, told = place.on_screen("run", AMBIGUOUS, replies=[
        (begun, "\n"), (ASKED, "later\n")])
    assert status == 3 and len(place.calls(AMBIGUOUS)) == 1, told


@here
def test_a_question_without_a_recommendation_offers_none(place: Place) -> None:
    (report,) = (step["report"] for step in ASKS if "report" in step)
    place.program.scenarios({"ambiguous_task/1.1": {"attempts": [
        [{"report": {**report, "recommendation": ""}}]]}})
    asked = f"  c) {SQLITE}\nAnswer, letter, later: "
    status, told = place.on_screen("run", AMBIGUOUS, replies=[
        (asked, "\n"), ("Answer, letter, later: ", "skip\n"),
        ("Answer, letter, later: ", "later\n")])
    assert status == 3, told
    status, told = place.run("resume", AMBIGUOUS, "--skip")
    assert status == 2 and "the agent recommended nothing" in told


@here
def test_a_question_that_comes_again_when_it_was_answered_ends_as_a_loop(
    place: Place,
) -> None:
    asks = {"attempts": [ASKS]}
    place.program.scenarios({"ambiguous_task/1.1": asks,
                             "ambiguous_task/1.1/answer": asks})
    status, told = place.on_screen("run", AMBIGUOUS, replies=[(ASKED, "b\n")])
    assert status == 1
    assert "failed: asks again what was answered: Where should quotes be kept?" in told
    assert len(place.calls(AMBIGUOUS)) == 2
    place.is_free(AMBIGUOUS)


# ---- doomed_to_fail.md ---------------------------------------------------------------

WHY = "failed 3 times, limit 3, errors 100% alike"
REJECTED = ("git for-each-ref --format='%(refname)' --sort=-committerdate "
            "refs/orchestrator/doomed_to_fail/rejected")


@here
def test_a_doomed_task_is_not_done_either_when_the_agent_says_so(place: Place) -> None:
    place.program.scenarios({"doomed_to_fail/1.1": {"attempts": [[
        {"bash": f"mkdir -p doomed && seq {length} >doomed/list.txt"},
        {"report": {"status": "completed", "summary": "Both lengths hold."}}]
        for length in (100, 50, 75)]}})
    status, told = place.run("run", DOOMED)
    assert status == 1 and f"Task 1.1 failed: {WHY}\n" in told
    assert re.findall(r"1\.1  gate `.*`: (.*)", told) == ["exit 1"] * 3


@everywhere
@pytest.mark.parametrize("run", [Place.run, Place.on_screen],
                         ids=["without a terminal", "on a terminal"])
def test_a_doomed_task_ends_after_three_attempts_and_says_why(
    place: Place, run: Callable[..., tuple[int, str]],
) -> None:
    status, told = run(place, "run", DOOMED, "--fresh")
    assert status == 1 and f"Task 1.1 failed: {WHY}\n" in told
    assert f"Task 1.1: {WHY}\n" in place.run("status", DOOMED)[1]
    state = place.program.state(DOOMED.stem)
    assert state["failed_tasks"] == ["1.1"]
    assert place.inside(DOOMED, "git rev-parse HEAD; git status -s; ls") == \
        f"{state['base']}\nREADME.md"
    refs = place.inside(DOOMED, REJECTED).splitlines()[:3]
    kept = [place.inside(DOOMED, f"git show {ref}:doomed/list.txt | wc -l")
            for ref in refs]
    assert sorted(kept) == ["100", "50", "75"]
    for again, said in (
            place.run("run", DOOMED), place.run("resume", DOOMED),
            place.on_screen("run", DOOMED, replies=[(AGAIN, "\n")])):
        assert again == 1 and f"task 1.1 {WHY}\n" in said and "--guidance" in said
    assert [call["status"] for call in place.calls(DOOMED)] == ["failed"] * 3
    place.is_free(DOOMED)
