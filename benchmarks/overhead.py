"""Overhead per task against a bare shell loop over the same agent, local sandbox.

    python benchmarks/overhead.py [TASKS ...]      default: 3 50 500
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from table import PROGRAM, ROOT, git_repository, measured, show

AGENT = ROOT / "benchmarks" / "agent.sh"
LOOP = 'i=0; while [ $i -lt "$1" ]; do "$2" <prompt.txt >out.ndjson; i=$((i+1)); done'


def row(tasks: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = git_repository(Path(name))
        (folder / "prompt.txt").write_text("Do the task.\n" * 50)
        plan = ["# Bench\n"]
        plan += [f"## Task 1.{n}: Step {n}\n\nChange the file.\n" for n in range(tasks)]
        (folder / "bench.md").write_text("\n".join(plan))
        program = [sys.executable, str(PROGRAM)]
        bare = measured(["sh", "-c", LOOP, "sh", str(tasks), str(AGENT)], folder)
        idle = measured([*program, "check", "bench.md"], folder)
        ours = measured([*program, "run", "bench.md", "--sandbox", "local",
                         "--claude", str(AGENT)], folder)
    per_task = [1000 * (o - b) / tasks for o, b in zip(ours, bare, strict=True)]
    no_start = [1000 * (o - b - i) / tasks
                for o, b, i in zip(ours, bare, idle, strict=True)]
    return {"tasks": tasks, "loop ms": round(1000 * bare[0] / tasks, 1),
            "overhead wall ms": round(per_task[0], 1),
            "overhead CPU ms": round(per_task[1], 1),
            "less start-up, wall ms": round(no_start[0], 1),
            "less start-up, CPU ms": round(no_start[1], 1)}


if __name__ == "__main__":
    show("overhead per task", [row(int(n)) for n in sys.argv[1:] or (3, 50, 500)])
