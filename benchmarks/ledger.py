"""Reading a ledger of many lines: `costs` and `history`, and the first post of metrics.

    python benchmarks/ledger.py [LINES]            default: 100000 (80 MB)
"""
from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from table import PROGRAM, measured, show

TOKENS = {"input": 10, "output": 2000, "cache_read": 100_000, "cache_creation": 5000}
POST = """import sys, pathlib, ktrdr_orchestrator as ko
with pathlib.Path("state/ledger.jsonl").open("rb") as file:
    totals = ko.counted({}, ko.json_objects(file))
ko.metrics_data(totals, None, 1, 2)"""


def lines(count: int) -> Iterator[str]:
    """Calls as runs write them, of 40 milestones over a year."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for n in range(count):
        at = start + timedelta(days=365 * n / count)
        yield json.dumps({
            "v": 1, "at": at.isoformat(timespec="milliseconds"),
            "milestone": f"M{n % 40}", "run": f"2026-{n % 9 + 1:02}-01T00:00:00+00:00",
            "task": f"{n % 7 + 1}.{n % 9}", "attempt": n % 3 + 1, "tokens": TOKENS,
            "models": {"claude-opus-5-5": TOKENS | {"cost_usd": 0.25}},
            "duration_s": 123.456, "ended": "exit", "status": "completed",
            "rule": "structured", "evidence": "Added it with tests; 42 pass. " * 4,
            "session_id": "6f1b2c3d-1111-2222-3333-444455556666", "turns": 17,
            "cost_usd": 0.25, "fix_plan": "", "commit": "a" * 40, "is_idle": False,
            "transcript": "1.1-1.ndjson", "is_open": False})


if __name__ == "__main__":
    number = int((sys.argv[1:] or ["100000"])[0])
    with tempfile.TemporaryDirectory() as name:
        (here := Path(name) / "state").mkdir()
        with (here / "ledger.jsonl").open("w", encoding="utf-8") as ledger:
            ledger.writelines(f"{line}\n" for line in lines(number))
        commands = {" ".join(args): [sys.executable, str(PROGRAM), *args] for args in (
            ("costs",), ("costs", "--by", "model"), ("history",))}
        commands["first post of metrics, in a thread"] = [
            sys.executable, "-c", f"import sys; sys.path.insert(0, "
            f"{str(PROGRAM.parent)!r})\n{POST}"]
        show(f"ledger of {number} lines", [
            {"what": what, "wall_s": round(min(
                measured(argv, here.parent)[0] for _ in range(3)), 2)}
            for what, argv in commands.items()])
