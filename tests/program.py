"""Runs the program as a user does: a process of its own, in a folder of its own."""
from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from conftest import ROOT, TEST_PLANS

PROGRAM = ROOT / "ktrdr_orchestrator.py"
SCRIPTED = TEST_PLANS / "scripted_claude.py"
LOCAL = ("--sandbox", "local", "--claude", f"{sys.executable} -S {SCRIPTED}")


class Program:
    """`run("run", PLAN)` in `cwd`; scenarios and variables for the scripted agent."""

    def __init__(self, cwd: Path, **environ: str) -> None:
        self.cwd = cwd
        self.log = cwd / "calls.log"
        self.environ = {
            k: v for k, v in os.environ.items()
            if not k.startswith(("ORCHESTRATOR_", "OTEL_", "CLAUDE", "ANTHROPIC"))
        } | {"SCRIPTED_CLAUDE_LOG": str(self.log), "CLAUDE_CONFIG_DIR": str(cwd / ".c"),
             "PYTHONDONTWRITEBYTECODE": "1", **environ}

    def scenarios(self, scenarios: dict[str, Any]) -> Program:
        path = self.cwd / "scenarios.json"
        path.write_text(json.dumps(scenarios))
        self.environ["SCRIPTED_CLAUDE_SCENARIOS"] = str(path)
        return self

    def start(self, *args: str | Path, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, args)], cwd=self.cwd, text=True,
            env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, **options)

    def run(
        self, *args: str | Path, timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        started = self.start(*args)
        out, err = started.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(args, started.returncode, out, err)

    def kill_at(self, pattern: str, *args: str | Path, times: int = 1,
                timeout_s: float = 60) -> None:
        """Kill -9 it as soon as that many lines of its progress have matched."""
        started, told = self.start(*args), ""
        until = time.monotonic() + timeout_s
        assert started.stderr
        while times:
            told += (line := started.stderr.readline())
            times -= bool(re.search(pattern, line))
            if not line or time.monotonic() > until:
                started.kill()
                raise AssertionError(f"it never told {pattern!r}:\n{told}")
        started.kill()
        started.communicate()

    def state(self, milestone: str) -> Any:
        return json.loads((self.cwd / f"state/{milestone}_state.json").read_text())

    def workspace(self, milestone: str) -> Path:
        return self.cwd / "state" / milestone / "workspace"

    def git(self, milestone: str, *args: str) -> str:
        return subprocess.run(["git", *args], cwd=self.workspace(milestone), check=True,
                              capture_output=True, text=True).stdout.strip()

    def ledger(self) -> list[Any]:
        lines = (self.cwd / "state/ledger.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def calls(self) -> list[Any]:
        """What the scripted agent was called with, a call a line."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def alive(self) -> list[int]:
        """Processes that carry the mark of a sandbox under this folder."""
        mark = f"KTRDR_SANDBOX={self.cwd}/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


class Screen:
    """The program on a terminal of its own, which is hung up at the end."""

    def __init__(self, program: Program, *args: str | Path) -> None:
        self._fd, terminal = os.openpty()
        # setsid makes the terminal its own: Ctrl-C there and a hang-up reach it
        self._popen = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, str(PROGRAM), *map(str, args)],
            cwd=program.cwd, env=program.environ | {"TERM": "xterm"}, stdin=terminal,
            stdout=terminal, stderr=terminal)
        os.close(terminal)
        self.text, self._read = "", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hang_up()
        self._popen.kill()
        self._popen.wait(30)

    def hang_up(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _look(self, timeout_s: float) -> bool:
        """More on the screen; False when the program closed it."""
        try:
            if select.select([self._fd], [], [], max(0, timeout_s))[0]:
                shown = os.read(self._fd, 65536).decode("utf-8", "replace")
                self.text = (self.text + shown).replace("\r\n", "\n")
            return True
        except OSError:              # EIO: nobody has the other end
            return False

    def until(self, words: str, *, timeout_s: float = 30) -> None:
        """Read on until `words` are there."""
        until = time.monotonic() + timeout_s
        while (at := self.text.find(words, self._read)) < 0:
            assert time.monotonic() < until and self._look(0.1), \
                f"no {words!r}, but {self.text[self._read:]}"
        self._read = at + len(words)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode("utf-8", "surrogateescape"))

    def reply(self, words: str, keys: str) -> None:
        self.until(words)
        self.type(keys)

    def end(self, *, timeout_s: float = 60) -> int:
        """The exit status."""
        until = time.monotonic() + timeout_s
        while self._fd >= 0 and self._look(0.1):
            assert time.monotonic() < until, f"it does not end: {self.text}"
        return self._popen.wait(timeout_s)
