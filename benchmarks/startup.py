"""Start-up: `--help`, and from the start of `run` to the first call of the agent.

    python benchmarks/startup.py [ROUNDS]          default: 20
"""
from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import PROGRAM, git_repository, measured, show

STAMPING_AGENT = "#!/bin/sh\ndate +%s.%N >>calls.txt\nexec sleep 60\n"


def help_ms(argv: list[str], rounds: int, folder: Path) -> float:
    return statistics.median(1000 * measured(argv, folder)[0] for _ in range(rounds))


def first_call_and_interrupt_ms(folder: Path, rounds: int) -> tuple[float, float]:
    """From fork of the program to the agent's first line; from SIGINT to the exit."""
    (folder / "plan.md").write_text("# Bench\n\n## Task 1.1: One\n\nDo it.\n")
    agent = folder / "agent.sh"
    agent.write_text(STAMPING_AGENT)
    agent.chmod(0o755)
    stamps = folder / "state" / "plan" / "workspace" / "calls.txt"
    calls, ends = [], []
    for _ in range(rounds):
        stamps.unlink(missing_ok=True)
        begun = time.time()
        started = subprocess.Popen(
            [sys.executable, str(PROGRAM), "run", "plan.md", "--sandbox", "local",
             "--claude", str(agent)], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (stamps.exists() and stamps.read_text()):
            time.sleep(0.002)
        calls.append(1000 * (float(stamps.read_text().split()[0]) - begun))
        begun = time.perf_counter()
        os.kill(started.pid, signal.SIGINT)
        started.wait()
        ends.append(1000 * (time.perf_counter() - begun))
    return statistics.median(calls), statistics.median(ends)


if __name__ == "__main__":
    count = int((sys.argv[1:] or ["20"])[0])
    with tempfile.TemporaryDirectory() as name:
        here = git_repository(Path(name))
        first, interrupt = first_call_and_interrupt_ms(here, count)
        show("start-up", [
            {"what": "python -c pass",
             "ms": round(help_ms([sys.executable, "-c", "pass"], count, here), 1)},
            {"what": "--help",
             "ms": round(help_ms([sys.executable, str(PROGRAM), "--help"], count,
                                 here), 1)},
            {"what": "run to first agent call", "ms": round(first, 1)},
            {"what": "Ctrl-C to exit, agent obeys", "ms": round(interrupt, 1)}])
