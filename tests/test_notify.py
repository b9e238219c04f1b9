"""Section 9, Notifier: somebody elsewhere is told, and it never matters if not."""
from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from conftest import TEST_PLANS
from program import LOCAL, Program
from receiver import Receiver

pytestmark = pytest.mark.contract
HELLO, AMBIGUOUS = TEST_PLANS / "hello_world.md", TEST_PLANS / "ambiguous_task.md"


class NewsReceiver(Receiver):
    """Takes JSON posts as Slack and Discord do; `status` is what it answers."""

    def __init__(self) -> None:
        super().__init__("/hook/secret-path")
        self.posts: list[Any] = []
        self.status, self.seen = 204, ""

    def take(self, path: str, headers: Message, body: bytes) -> int:
        assert headers["Content-Type"] == "application/json"
        self.posts.append(json.loads(body))
        self.seen += subprocess.run(["ps", "-eww", "-o", "args="], check=True,
                                    capture_output=True, text=True).stdout
        return self.status


@pytest.fixture
def receiver() -> Iterator[NewsReceiver]:
    with NewsReceiver() as server:
        yield server


def news(folder: Path) -> list[Any]:
    path = folder / "news"
    return [json.loads(line) for line in path.read_text().splitlines()] \
        if path.exists() else []


TO_FILE = "cat >>news; echo >>news"


def test_a_command_gets_the_news_of_an_end_as_json(repository: Path) -> None:
    done = Program(repository).run("run", HELLO, *LOCAL, "--notify-command", TO_FILE)
    assert done.returncode == 0, done.stderr
    told, = news(repository)
    assert (told["event"], told["milestone"]) == ("completed", "hello_world")
    assert "hello_world" in told["text"] and told["text"] == told["content"]


def test_a_question_is_told_once_with_its_options_and_then_the_end(
    repository: Path,
) -> None:
    program = Program(repository, ORCHESTRATOR_NOTIFY_COMMAND=TO_FILE)
    for _ in range(3):                   # as cron does
        assert program.run("run", AMBIGUOUS, *LOCAL).returncode == 3
    told, = news(repository)
    assert told["event"] == "question" and "b)" in told["text"]
    assert program.run("resume", AMBIGUOUS, *LOCAL, "--answer", "b").returncode == 0
    assert [n["event"] for n in news(repository)] == ["question", "completed"]


def test_a_failed_milestone_and_one_that_cannot_go_on_are_told(
    repository: Path,
) -> None:
    program = Program(repository, ORCHESTRATOR_NOTIFY_COMMAND=TO_FILE)
    doomed = TEST_PLANS / "doomed_to_fail.md"
    assert program.run("run", doomed, *LOCAL).returncode == 1
    limit = {"limit": {"resets_in_s": 86400}}
    program.scenarios({"hello_world/1.1": {"attempts": [[limit]]}})
    assert program.run("run", HELLO, *LOCAL).returncode == 75
    assert [n["event"] for n in news(repository)] == ["failed", "interrupted"]
    assert "start again after" in news(repository)[1]["text"]


def test_a_url_gets_the_news_as_slack_and_discord_take_it(
    repository: Path, receiver: NewsReceiver,
) -> None:
    done = Program(repository).run("run", HELLO, *LOCAL, "--notify-url", receiver.url)
    assert done.returncode == 0, done.stderr
    post, = receiver.posts
    assert post["event"] == "completed" and post["text"] == post["content"]


def test_a_url_from_the_environment_is_in_no_argument(
    repository: Path, receiver: NewsReceiver,
) -> None:
    program = Program(repository, ORCHESTRATOR_NOTIFY_URL=receiver.url)
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert receiver.posts and "curl" in receiver.seen
    assert "secret-path" not in receiver.seen


@pytest.mark.parametrize("how", ["refused", "500", "fails", "missing"])
def test_a_notifier_that_fails_is_a_warning_and_changes_nothing_else(
    repository: Path, receiver: NewsReceiver, how: str,
) -> None:
    receiver.status = 500
    args = {"refused": ("--notify-url", "http://127.0.0.1:9/x"),
            "500": ("--notify-url", receiver.url),
            "fails": ("--notify-command", "echo no >&2; exit 3"),
            "missing": ("--notify", "desktop")}[how]
    program = Program(repository)
    if how == "missing":
        program.environ["PATH"] = "/usr/bin:/bin"
    done = program.run("run", HELLO, *LOCAL, *args)
    assert done.returncode == 0 and done.stderr.count("nobody was told") == 1
    assert "secret-path" not in done.stderr


@pytest.mark.slow
def test_a_notifier_that_hangs_is_given_up(repository: Path) -> None:
    begun = time.monotonic()
    done = Program(repository).run("run", HELLO, *LOCAL, "--notify-command",
                                   "sleep 600", timeout_s=60)
    assert done.returncode == 0 and "nobody was told" in done.stderr
    assert time.monotonic() - begun < 30
