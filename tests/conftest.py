"""Markers, the guard that keeps unit tests inside, and what may be missing."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from receiver import OtlpReceiver

ROOT = Path(__file__).parent.parent
TEST_PLANS = ROOT / "test_plans"
RECORDINGS = Path(__file__).parent / "data" / "recordings"
CLAUDE_VERSION = "2.1.330"
REQUIRES_ALL = os.environ.get("REQUIRE_ALL") == "1"
OUTSIDE = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system",
           "socket.connect", "time.sleep"}
for _number in (signal.SIGINT, signal.SIGHUP):   # started with & or nohup, tests would
    if signal.getsignal(_number) == signal.SIG_IGN:      # start what ignores them too
        signal.signal(_number, signal.SIG_DFL)
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(TEST_PLANS)]

_unit_test = ""


def _refuse_the_outside(event: str, _args: object) -> None:
    if _unit_test and event in OUTSIDE:
        raise AssertionError(f"{_unit_test} reached the outside ({event}): "
                             "mark it contract or docker")


sys.addaudithook(_refuse_the_outside)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item],
) -> None:
    for item in items:
        if not any(map(item.get_closest_marker, ("contract", "docker"))):
            item.add_marker("unit")
    if not REQUIRES_ALL:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):  # type: ignore[no-untyped-def]
    global _unit_test
    _unit_test = item.nodeid if item.get_closest_marker("unit") else ""
    try:
        return (yield)
    finally:
        _unit_test = ""


def missing(what: str) -> None:
    """Skip; where everything is required, fail."""
    if REQUIRES_ALL:
        pytest.fail(f"REQUIRE_ALL=1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def real_claude() -> str:
    """The real CLI, in the version that the recordings were made with."""
    path = shutil.which("claude")
    if not path:
        missing("claude is not installed "
                f"(npm install -g @anthropic-ai/claude-code@{CLAUDE_VERSION})")
    shown = subprocess.run([str(path), "--version"], capture_output=True, text=True,
                           check=False, timeout=60)
    if CLAUDE_VERSION not in shown.stdout:
        missing(f"claude --version says {shown.stdout!r}, not {CLAUDE_VERSION}")
    return str(path)


@pytest.fixture(scope="session")
def docker_engine() -> str:
    """The engine's version."""
    if not shutil.which("docker"):
        missing("docker is not installed")
    shown = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"],
                           capture_output=True, text=True, check=False, timeout=60)
    if shown.returncode != 0:
        missing(f"no Docker engine answers: {shown.stderr.strip()}")
    return shown.stdout.strip()


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """An OTLP backend on loopback."""
    from receiver import OtlpReceiver as Backend  # what it decodes is slow to import
    with Backend() as server:
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("# A project\n")
    git = ("git", "-c", "user.name=Somebody", "-c", "user.email=somebody@localhost")
    for args in (("init", "-q", "-b", "main"), ("add", "."), ("commit", "-qm", "One")):
        subprocess.run([*git, *args], cwd=folder, check=True)
    return folder
