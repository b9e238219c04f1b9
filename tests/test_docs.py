"""README, --help and the program say the same."""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import RECORDINGS, ROOT, TEST_PLANS
from program import LOCAL, Program

import ktrdr_orchestrator as ko

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS_ROW = re.compile(
    r"^\| `(--[\w-]+)` \| `(\w+)` \| `(\w+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings
            if flag.startswith("--")}


def section(title: str) -> str:
    return README.partition(f"\n### {title}\n")[2].partition("\n#")[0]


def default_of(key: str) -> str:
    """As --help tells it."""
    action = next(a for a in COMMANDS["run"]._actions if a.dest == key)
    return (action.help or "").rpartition("(default: ")[2].rstrip(")")


COMMANDS = subcommands(ko.build_parser())


def test_the_settings_table_is_the_programs() -> None:
    rows = [(ko.setting_flag(key), f"ORCHESTRATOR_{key.upper()}", key, default_of(key),
             setting.metadata["help"]) for key, setting in ko.SETTINGS.items()]
    assert SETTINGS_ROW.findall(README) == rows


def test_every_setting_is_a_flag_of_every_command_that_takes_settings() -> None:
    for name, parser in COMMANDS.items():
        if name != "sandbox":
            assert set(map(ko.setting_flag, ko.SETTINGS)) <= flags(parser), name


def test_every_command_is_in_the_readme_with_the_flags_it_names() -> None:
    table = README.partition("\n## Commands\n")[2].partition("\n###")[0]
    rows = dict(re.findall(r"^\| `(\w+)[^`]*` \| (.+) \|$", table, re.MULTILINE))
    assert rows.keys() == COMMANDS.keys()
    common = set(map(ko.setting_flag, ko.SETTINGS))
    common |= {"--help", "--config", "--json"}
    for name, told in rows.items():
        if name != "sandbox":
            assert set(re.findall(r"--[\w-]+", told)) == flags(COMMANDS[name]) - common


def test_the_sandbox_actions_are_in_the_readme() -> None:
    told = re.search(r"^\| `sandbox ([^`]+)`", README, re.MULTILINE)
    assert told and told[1].split("\\|") == list(subcommands(COMMANDS["sandbox"]))


@pytest.mark.parametrize("place", ["README", "--help", "contract"])
def test_every_exit_status_is_told(place: str) -> None:
    text = {"README": section("Exit status"), "--help": ko.build_parser().format_help(),
            "contract": (ko.__doc__ or "").partition("Exit status")[2]}[place]
    told = {int(number) for number in re.findall(r"\b(\d{1,3})\b", text)}
    assert {int(code) for code in ko.ExitCode} <= told


def test_help_and_contract_name_every_command() -> None:
    assert set(COMMANDS) <= set(re.findall(r"\w+", ko.build_parser().format_help()))
    assert set(COMMANDS) <= set(re.findall(r"\w+", ko.__doc__ or ""))


def test_the_commands_with_json_are_those_of_the_shape_table() -> None:
    with_json = {n for n, p in COMMANDS.items() if "--json" in flags(p)}
    with_json |= {f"sandbox {n}" for n, p in subcommands(COMMANDS["sandbox"]).items()
                  if "--json" in flags(p)}
    told = re.findall(r"^\| `([a-z ]+)[A-Z]*` \|", section("`--json`"), re.MULTILINE)
    assert {name.strip() for name in told} == with_json


def test_no_document_names_a_file_that_is_not_there() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"),
                 ROOT / "sandbox/README.md", ROOT / "deploy/README.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_first_commands_are_the_ones_that_are_tried_in_a_clean_clone() -> None:
    blocks = re.findall(r"```sh\n(.+?)```", README, re.DOTALL)
    assert "run test_plans/health_check.md" in blocks[0]
    assert "python -m pytest" in blocks[1]
    assert "python -m pytest" in Path(ROOT / ".ci/run").read_text(encoding="utf-8")


def names_in(shape: str) -> tuple[set[str], set[str]]:
    """The names in a shape of the README: of the outermost object, and all of them."""
    outer, every, depth = set(), set(), 0
    for token in re.findall(r'[{}\[\]]|"\w+"', shape):
        if token in "{}[]":
            depth += {"{": 1, "}": -1}.get(token, 0)
        else:
            every.add(token.strip('"'))
            outer |= {token.strip('"')} if depth == 1 else set()
    return outer, every


def keys_in(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(keys_in, value))
    if not isinstance(value, dict):
        return set()
    parts = (keys_in(part) for key, part in value.items() if key not in DYNAMIC)
    return set(value).union(*parts)


DYNAMIC = {"models", "tokens"}       # keyed by what there is to count


@pytest.mark.contract
def test_what_json_prints_has_the_shape_that_the_readme_tells(repository: Path) -> None:
    program, plan = Program(repository), TEST_PLANS / "e2e_will_pass.md"
    assert program.run("run", plan, *LOCAL).returncode == 0
    shapes = dict(re.findall(r"^\| `([a-z ]+[A-Z]*)` \| `(.+)` \|$",
                             section("`--json`").replace("\\|", "|"), re.MULTILINE))
    stream = RECORDINGS / "limit_5h_oauth.ndjson"
    for command, args in {"check PLAN": ("check", plan), "check": ("check", *LOCAL),
                          "status PLAN": ("status", plan), "history": ("history",),
                          "costs": ("costs",), "explain": ("explain", stream)}.items():
        printed = json.loads(program.run(*args, "--json").stdout)
        outer, every = names_in(shapes[command])
        assert set(printed[0] if isinstance(printed, list) else printed) == outer
        assert keys_in(printed) <= every, command
