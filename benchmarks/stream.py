"""What a stream costs: CPU per event and peak memory, the whole way from the agent's
pipe through the transcript to the result, against json.loads on every line.

    python benchmarks/stream.py [EVENTS]           default: 100000 (about 200 MB)
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import ROOT, show

MEASURE = """
import json, pathlib, resource, sys, time
sys.path.insert(0, sys.argv[1])
import ktrdr_orchestrator as ko
way, source, target = sys.argv[2], pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
def used():
    return time.process_time()
begun, events = used(), 0
if way == "json.loads on every line":
    with source.open("rb") as file:
        for line in file:
            json.loads(line)
            events += 1
elif way == "decoder alone":
    decoder = ko.StreamDecoder()
    with source.open("rb") as file:
        while chunk := file.read(1 << 20):
            decoder.feed(chunk)
    events = decoder.finish().events
else:
    transcript = ko.Transcript(target, ko.StreamDecoder(), lambda idle_s: None)
    done = ko.Processes(ko.Clock()).run(
        ko.Command(argv=("cat", str(source))), listener=transcript, timeout_s=600)
    events = transcript.finish(done).events
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"events": events, "cpu_s": used() - begun, "peak_mb": peak}))
"""


def write_stream(path: Path, events: int) -> None:
    """Tool calls and results in turn as a long session has them, then the result."""
    code = "def f(x):\n    return x + 1\n" * 60
    with path.open("w") as file:
        for n in range(events // 2):
            tool_id = f"toolu_{n:06}"
            file.write(json.dumps({"type": "assistant", "message": {
                "id": f"msg_{n}", "role": "assistant", "content": [
                    {"type": "tool_use", "id": tool_id, "name": "Write", "input": {
                        "file_path": f"/workspace/f{n}.py", "content": code}}]},
                "session_id": "s-1"}, separators=(",", ":")) + "\n")
            file.write(json.dumps({"type": "user", "message": {
                "role": "user", "content": [
                    {"tool_use_id": tool_id, "type": "tool_result", "content": code}]},
                "session_id": "s-1"}, separators=(",", ":")) + "\n")
        file.write(json.dumps({"type": "result", "subtype": "success", "result": "done",
                               "num_turns": events // 2}) + "\n")


def measure(way: str, source: Path, target: Path) -> dict[str, object]:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT), way, str(source),
                           str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    told = json.loads(done.stdout)
    return {"way": way, "events": told["events"],
            "CPU us per event": round(1e6 * told["cpu_s"] / told["events"], 1),
            "peak MB": round(told["peak_mb"], 1),
            "wall s": round(time.perf_counter() - begun, 2)}


if __name__ == "__main__":
    count = int((sys.argv[1:] or ["100000"])[0])
    with tempfile.TemporaryDirectory() as name:
        stream = Path(name) / "stream.ndjson"
        write_stream(stream, count)
        ways = ("json.loads on every line", "decoder alone",
                "pipe, transcript, decoder")
        rows = [measure(way, stream, Path(name) / "out.ndjson") for way in ways]
        show(f"stream of {count} events, {stream.stat().st_size / 1e6:.0f} MB", rows)
