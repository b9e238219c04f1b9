"""Reset of a sandbox with 100,000 small untracked files beside what one types instead;
and after how many faults (tests/reset_faults.py) each of them ends clean.

    python benchmarks/reset.py [ROUNDS [FAULTS]]   default: 3, all; 0 leaves a part out

Needs the sandbox image. The repository is made: 2,400 files, 33 MB. Each way starts
from the same dirt, written to disk; the ways take turns. `reset` is the whole command,
start of the janitor's container included; the others run in the container that is up.
"""
from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from table import ROOT, show

sys.path.insert(0, str(ROOT / "tests"))
from reset_faults import FAULTS, ROOT_FAULTS, listing, make_repository
from workspace_box import Box, bundle

FILES, FILE_BYTES = 2400, 33_000_000 // 2400
DIRT = """
import os
os.chdir("/workspace")
for i in range(1000):
    os.makedirs(f"node_modules/{i}")
    for j in range(100):
        with open(f"node_modules/{i}/{j}.js", "w") as file:
            file.write("x" * 340)
for i in range(0, 2400, 100):
    with open(f"src/{i % 60}/{i}.py", "a") as file:
        file.write("dirt")
os.sync()
"""
RESET = "reset"
WAYS = {RESET: "", "rm -rf node_modules": "rm -rf node_modules",
        "git clean -fdx && git checkout .": "git clean -fdxq && git checkout -q .",
        "git clean -ffdx; git reset --hard":
            "git clean -ffdxq; git reset -q --hard refs/remotes/origin/main"}
PEER = "git clean -fdx && git checkout ."
# A container made anew has none of this either; this is quicker.
END = """cd /; find ~ /tmp -mindepth 1 -maxdepth 1 ! -name .claude -exec rm -rf {} +
kill -9 -1"""
OF_GIT = ("head", "config", "hooks", "locks", "kept")   # what git could be asked for


def real_size_repository(folder: Path) -> Path:
    chance = random.Random(1)
    for i in range(FILES):
        path = folder / "src" / str(i % 60) / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(chance.randbytes(30).hex()
                                  for _ in range(FILE_BYTES // 61)))
    (folder / ".gitignore").write_text("node_modules/\n")
    git = ("git", "-c", "user.name=Bench", "-c", "user.email=bench@localhost")
    for args in (("init", "-q", "-b", "main"), ("add", "."), ("commit", "-qm", "One")):
        subprocess.run([*git, *args], cwd=folder, check=True)
    return folder


def seconds(box: Box, way: str) -> float:
    subprocess.run(("docker", "exec", box.container, "python3", "-c", DIRT), check=True)
    begun = time.perf_counter()
    if way == RESET:
        told = box.janitor("reset")
        assert told.get("clean"), told
    else:
        box.inside(f"cd /workspace && {WAYS[way]}")
    took_s = time.perf_counter() - begun
    print(f"{way}: {took_s:.2f} s", file=sys.stderr)   # minutes on a busy machine
    box.janitor("reset")
    box.janitor("sweep")
    return took_s


def speed(box: Box, rounds: int) -> list[dict[str, object]]:
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, seen in taken.items():
            seen.append(seconds(box, way))
    return [{"way": way, "median s": round(statistics.median(seen), 2),
             "least s": round(min(seen), 2), "most s": round(max(seen), 2)}
            for way, seen in taken.items()]


def is_clean(box: Box, files: dict[str, str], wanted: Sequence[str]) -> bool:
    try:
        found, rest = box.look()
    except ValueError:      # no listing: /workspace cannot be read, or holds odd names
        return False
    return found == files and [x for x in rest if x.startswith(OF_GIT)] == wanted


def shares(box: Box, source: Path, count: int) -> list[dict[str, object]]:
    files = listing(source)
    wanted = [x for x in box.look()[1] if x.startswith(OF_GIT)]
    clean = dict.fromkeys((RESET, PEER), 0)
    faults = [*FAULTS, *ROOT_FAULTS][:count]
    for fault in faults:
        for way in clean:
            box.inject(fault)
            box.inside(END)
            if way == RESET:
                box.janitor("reset")
                clean[way] += is_clean(box, files, wanted)
            else:
                # a pipe for a .git/config would be read for ever
                box.inside(f"cd /workspace && timeout 20 sh -c '{WAYS[way]}'")
                clean[way] += is_clean(box, files, wanted)
                box.janitor("reset")
    return [{"way": way, "clean": number, "of": len(faults)}
            for way, number in clean.items()]


def main(rounds: int, faults: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        sources = {"speed": real_size_repository(Path(name) / "speed"),
                   "faults": make_repository(Path(name) / "faults")}
        for what, source in sources.items():
            box = Box(f"ktrdr-bench-{os.getpid()}-{what}")
            try:
                box.anew()
                box.janitor("fill", "--home", "main", stdin=bundle(source))
                box.inside("printf model >/env/models/keep.pt")
                if what == "speed" and rounds:
                    show("reset, 100,000 files", speed(box, rounds))
                if what == "faults" and faults:
                    show("ends clean", shares(box, source, faults))
            finally:
                box.down()


if __name__ == "__main__":
    asked = [int(number) for number in sys.argv[1:]]
    main(*(asked + [3, len(FAULTS) + len(ROOT_FAULTS)][len(asked):]))
