"""What every benchmark prints: a table for people, then one line of JSON."""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "ktrdr_orchestrator.py"


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    header = list(rows[0])
    cells = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    print(title)
    for line in cells:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))
    print(json.dumps({"benchmark": title, "rows": rows}))


def measured(argv: Sequence[str], cwd: Path, *, expected: int = 0,
             ) -> tuple[float, float]:
    """Wall and CPU seconds of a command with all that it waited for."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, check=False,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
    wall_s = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        sys.exit(f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    cpu_s = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return wall_s, cpu_s


def git_repository(folder: Path) -> Path:
    """A repository with one commit."""
    git = ("git", "-c", "user.name=Bench", "-c", "user.email=bench@localhost")
    for args in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "One")):
        subprocess.run([*git, *args], cwd=folder, check=True)
    return folder
