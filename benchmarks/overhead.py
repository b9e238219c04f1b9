"""Overhead per task against a bare shell loop over the same agent, local sandbox.

    python benchmarks/overhead.py [TASKS ...]      default: 3 50 500

What happens once in a run (start of Python, clone, guard) is measured with plans of
one task and told apart: `per task` is what each further task adds.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from table import PROGRAM, ROOT, git_repository, measured, show

AGENT = ROOT / "benchmarks" / "agent.sh"
LOOP = 'i=0; while [ $i -lt "$1" ]; do "$2" <prompt.txt >out.ndjson; i=$((i+1)); done'


def more_than_the_loop(tasks: int, rounds: int) -> tuple[float, float]:
    """Wall and CPU seconds of a whole run less those of the loop; the least seen, for
    what a busy machine adds is not ours."""
    seen = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = git_repository(Path(name))
            (folder / "prompt.txt").write_text("Do the task.\n" * 50)
            plan = (f"## Task 1.{n}: Step {n}\n\nDo it.\n" for n in range(tasks))
            (folder / "bench.md").write_text("\n".join(["# Bench\n", *plan]))
            bare = measured(["sh", "-c", LOOP, "sh", str(tasks), str(AGENT)], folder)
            ours = measured([sys.executable, str(PROGRAM), "run", "bench.md",
                             "--sandbox", "local", "--claude", str(AGENT)], folder)
            seen.append((ours[0] - bare[0], ours[1] - bare[1]))
    wall, cpu = zip(*seen, strict=True)
    return min(wall), min(cpu)


def row(tasks: int, once: tuple[float, float]) -> dict[str, object]:
    wall_s, cpu_s = more_than_the_loop(tasks, 15 if tasks < 10 else 1)
    return {"tasks": tasks,
            "per task, wall ms": round(1000 * (wall_s - once[0]) / (tasks - 1), 1),
            "per task, CPU ms": round(1000 * (cpu_s - once[1]) / (tasks - 1), 1),
            "run of one task, wall ms": round(1000 * once[0])}


if __name__ == "__main__":
    one_task = more_than_the_loop(1, 15)
    show("overhead per task",
         [row(int(n), one_task) for n in sys.argv[1:] or (3, 50, 500)])
