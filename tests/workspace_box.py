"""A sandbox of the tests' own: the service, its janitor, and an independent look."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from reset_faults import FAULTS, LISTING, PRELUDE, ROOT_FAULTS

COMPOSE_FILE = Path(__file__).parent.parent / "sandbox" / "docker-compose.yml"
# What can differ after a reset, but for the files; git is asked with our options only.
LOOK = """
cd /workspace
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
git() { timeout 5 git "$@"; }      # a pipe for a file would be read for ever
echo "head $(git rev-parse HEAD) $(git symbolic-ref HEAD)"
echo "config $(git config --local --list | sort | tr '\\n' ' ')"
echo "git $(ls -A .git | grep -vx trash | sort | tr '\\n' ' ')"
echo "hooks $(ls -A .git/hooks 2>/dev/null)"
echo "refs $(git for-each-ref --format='%(refname)' | grep -v ^refs/orchestrator/ | \
tr '\\n' ' ')"
echo "locks $(find .git -name '*.lock')"
echo "logs $(ls -A /env/logs) $(stat -c %a:%u /env/logs /workspace | tr '\\n' ' ')"
echo "kept $(cat /env/models/keep.pt)"
echo "claude $(ls -A ~/.claude | tr '\\n' ' ') $(cat ~/.claude/.c* 2>/dev/null)"
"""
LOGIN = '{"userID": "u", "oauthAccount": {"emailAddress": "a@localhost"}}'


class Box:
    """`janitor("reset")` is what the program runs; `inside` is what an agent does."""

    def __init__(self, project: str) -> None:
        self.project, self.container = project, f"{project}-sandbox-1"
        self.env = {**os.environ, "SANDBOX_PROJECT": project,
                    "SANDBOX_PIDS": "256", "SANDBOX_MEMORY": "2g"}

    def compose(self, *args: str, stdin: bytes = b"", is_checked: bool = True,
                ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            ("docker", "compose", "-f", str(COMPOSE_FILE), *args), input=stdin,
            capture_output=True, check=False, env=self.env, timeout=600)
        if is_checked and done.returncode:
            raise AssertionError(f"{args}: {done.stderr.decode()}")
        return done

    def image(self) -> str:
        return self.compose("config", "--images", "sandbox").stdout.decode().strip()

    def anew(self, *, is_checked: bool = True) -> None:
        """As the program does before a reset: whatever still runs is gone."""
        self.compose("up", "-d", "--no-build", "--force-recreate", "-t", "0", "sandbox",
                     is_checked=is_checked)

    def down(self) -> None:
        self.compose("--profile", "janitor", "down", "-v", "-t", "0")

    def as_root(self, script: str) -> None:
        self.compose("run", "--rm", "-T", "--no-deps", "janitor", "bash", "-c", script)

    def janitor(self, *args: str, stdin: bytes = b"") -> dict[str, Any]:
        done = self.compose("run", "--rm", "-T", "--no-deps", "janitor", "workspace.py",
                            *args, stdin=stdin, is_checked=False)
        assert done.stdout, done.stderr.decode()
        told: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == ("error" in told), done
        return told

    def inside(self, script: str, *args: str) -> str:
        done = subprocess.run(
            ("docker", "exec", self.container, "bash", "-c", script, "bash", *args),
            capture_output=True, check=False, timeout=120)
        return done.stdout.decode(errors="replace").strip()

    def inject(self, fault: str) -> None:
        if fault in ROOT_FAULTS:
            self.as_root(ROOT_FAULTS[fault])
        else:
            self.inside(PRELUDE + FAULTS[fault])

    def look(self) -> tuple[dict[str, str], list[str]]:
        """The files with their content, and the rest line by line."""
        files, *rest = self.seen().splitlines()
        return json.loads(files), rest

    def seen(self) -> str:
        return self.inside(f"python3 -c '{LISTING}' /workspace; {LOOK}")


def bundle(repository: Path, *revisions: str) -> bytes:
    return subprocess.run(
        ("git", "bundle", "create", "-q", "-",
         *(revisions or ("HEAD", "--branches", "--tags"))),
        cwd=repository, check=True, capture_output=True).stdout
