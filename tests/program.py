"""Runs the program as a user does: a process of its own, in a folder of its own."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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

    def state(self, milestone: str) -> Any:
        return json.loads((self.cwd / f"state/{milestone}_state.json").read_text())

    def workspace(self, milestone: str) -> Path:
        return self.cwd / "state" / milestone / "workspace"

    def git(self, milestone: str, *args: str) -> str:
        return subprocess.run(["git", *args], cwd=self.workspace(milestone), check=True,
                              capture_output=True, text=True).stdout.strip()

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
