"""README, --help and the program say the same."""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from conftest import ROOT

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


def default_of(name: str) -> str:
    """As --help tells it."""
    action = next(a for a in COMMANDS["run"]._actions if a.dest == name)
    return (action.help or "").rpartition("(default: ")[2].rstrip(")")


COMMANDS = subcommands(ko.build_parser())


def test_the_settings_table_is_the_programs() -> None:
    rows = [(ko.setting_flag(s.name), f"ORCHESTRATOR_{ko.setting_key(s.name).upper()}",
             ko.setting_key(s.name), default_of(s.name), s.metadata["help"])
            for s in ko.SETTINGS]
    assert SETTINGS_ROW.findall(README) == rows


def test_every_setting_is_a_flag_of_every_command_that_takes_settings() -> None:
    for name, parser in COMMANDS.items():
        if name != "sandbox":
            assert {ko.setting_flag(s.name) for s in ko.SETTINGS} <= flags(parser), name


def test_every_command_is_in_the_readme_with_the_flags_it_names() -> None:
    table = README.partition("\n## Commands\n")[2].partition("\n###")[0]
    rows = dict(re.findall(r"^\| `(\w+)[^`]*` \| (.+) \|$", table, re.MULTILINE))
    assert rows.keys() == COMMANDS.keys()
    common = {ko.setting_flag(s.name) for s in ko.SETTINGS}
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
                 ROOT / "sandbox/README.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_first_commands_are_the_ones_that_are_tried_in_a_clean_clone() -> None:
    blocks = re.findall(r"```sh\n(.+?)```", README, re.DOTALL)
    assert "run test_plans/health_check.md" in blocks[0]
    assert "python -m pytest" in blocks[1]
    assert "python -m pytest" in Path(ROOT / ".ci/run").read_text(encoding="utf-8")
