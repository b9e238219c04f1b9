"""The file's own rules, checked on its syntax tree (HOUSE RULES in CONTRIBUTING)."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "ktrdr_orchestrator.py"
TEXT = SOURCE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# ==== (\d+)\. (.+?) =+ \[(\w+)\]$", re.MULTILINE)
SECTIONS = [(TEXT[:m.start()].count("\n") + 1, int(m[1]), m[2], m[3])
            for m in BANNER.finditer(TEXT)]
NAMES = ["Constants, exit codes, errors", "Settings", "Data model", "Plan parser",
         "Prompts", "Agent stream", "Verdict", "Loop detection, delays", "System ports",
         "Sandboxes", "Agent", "State, lock, ledger", "Telemetry", "Reporting",
         "Escalation desk", "Task runner", "E2E runner", "Milestone runner",
         "Command line"]
KINDS = {"vocabulary", "pure", "shell", "flow", "cli"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPURE = {"open", "print", "input", "os", "sys", "subprocess", "time", "signal",
          "socket", "threading", "tempfile", "shutil", "logging", "selectors", "fcntl"}
FORBIDDEN = {"vocabulary": IMPURE - {"signal"}, "pure": IMPURE,
             "flow": IMPURE | {"Path"}, "shell": {"print", "input"},
             "cli": {"print", "input", "subprocess"}}
MAX_LINES, MAX_FUNCTION_LINES = 3000, 40


def section_of(line: int) -> tuple[int, int, str, str]:
    return max((s for s in SECTIONS if s[0] <= line), default=(0, 0, "contract", ""))


def names_used(node: ast.AST) -> set[str]:
    """Names read in a definition, less its own parameters and variables."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return {n.id for n in names if isinstance(n.ctx, ast.Load)} - own


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else \
        [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def code_lines(function: ast.AST) -> int:
    """Lines that hold code: no docstring, comments or blanks."""
    assert isinstance(function, FUNCTIONS)
    start = function.body[0].lineno if not ast.get_docstring(function) else \
        function.body[1].lineno if len(function.body) > 1 else function.end_lineno or 0
    head = function.body[0].lineno - function.lineno
    lines = TEXT.splitlines()[start - 1:function.end_lineno]
    return head + sum(bool(x.strip()) and not x.strip().startswith("#") for x in lines)


TOP_LEVEL = [node for node in TREE.body if defined(node)]
HOME = {name: section_of(node.lineno)[1]
        for node in TOP_LEVEL for name in defined(node)}
ALL_FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, FUNCTIONS)]


def test_the_sections_of_the_design_stand_in_its_order() -> None:
    assert [(s[1], s[2]) for s in SECTIONS] == list(enumerate(NAMES, start=1))
    assert {s[3] for s in SECTIONS} == KINDS


@pytest.mark.parametrize("node", TOP_LEVEL, ids=lambda n: defined(n)[0])
def test_a_section_uses_only_what_stands_above_it(node: ast.stmt) -> None:
    mine = section_of(node.lineno)[1]
    assert not {name: HOME[name] for name in names_used(node)
                if HOME.get(name, 0) > mine}


@pytest.mark.parametrize("node", TOP_LEVEL, ids=lambda n: defined(n)[0])
def test_a_section_touches_only_what_its_kind_may(node: ast.stmt) -> None:
    kind = section_of(node.lineno)[3]
    assert not FORBIDDEN.get(kind, set()) & names_used(node)


@pytest.mark.parametrize("function", ALL_FUNCTIONS,
                         ids=lambda f: f"{f.name}:{f.lineno}")
def test_a_function_fits_on_a_screen(function: ast.AST) -> None:
    assert code_lines(function) <= MAX_FUNCTION_LINES


def test_the_file_can_be_audited_in_an_hour() -> None:
    assert TEXT.count("\n") <= MAX_LINES


def test_no_name_is_defined_twice() -> None:
    names = [name for node in TOP_LEVEL for name in defined(node)]
    assert len(names) == len(set(names))


def test_there_is_no_global_state_and_no_bare_except() -> None:
    assert not [n.lineno for n in ast.walk(TREE)
                if isinstance(n, ast.Global | ast.Nonlocal)]
    assert not [n.lineno for n in ast.walk(TREE)
                if isinstance(n, ast.ExceptHandler) and n.type is None]


def test_only_main_catches_everything() -> None:
    catchers = {f.name for f in ALL_FUNCTIONS for n in ast.walk(f)
                if isinstance(n, ast.ExceptHandler) and n.type is not None
                and re.search(r"\b(Base)?Exception\b", ast.unparse(n.type))}
    assert catchers == {"main"}


def test_nothing_works_at_import() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef,
               *FUNCTIONS)
    others = [n for n in TREE.body[1:] if not isinstance(n, allowed)]
    assert [ast.unparse(n).splitlines()[0] for n in others] == [
        "if __name__ == '__main__':"]


def test_opentelemetry_is_imported_in_the_telemetry_section_only() -> None:
    homes = {section_of(n.lineno)[2] for n in ast.walk(TREE)
             if isinstance(n, ast.Import | ast.ImportFrom)
             and "opentelemetry" in ast.unparse(n)}
    assert homes == {"Telemetry"}


def test_only_the_standard_library_and_opentelemetry_are_imported() -> None:
    roots = {alias.name.partition(".")[0] for n in ast.walk(TREE)
             if isinstance(n, ast.Import) for alias in n.names}
    roots |= {(n.module or "").partition(".")[0] for n in ast.walk(TREE)
              if isinstance(n, ast.ImportFrom)}
    assert roots - set(sys.stdlib_module_names) == {"opentelemetry"}


def test_public_functions_and_classes_say_what_they_are_for() -> None:
    silent = [n.name for n in TREE.body if isinstance(n, (*FUNCTIONS, ast.ClassDef))
              and not n.name.startswith("_") and not ast.get_docstring(n)
              and not (isinstance(n, ast.ClassDef) and len(n.body) <= 6)
              and not (isinstance(n, FUNCTIONS) and code_lines(n) <= 8)]
    assert not silent


def test_tests_patch_nothing() -> None:
    patching = re.compile(r"^\s*(from|import) (unittest\.)?mock\b"
                          r"|\bmonkeypatch\.setattr|\bmocker\b", re.MULTILINE)
    used = [path.name for path in Path(__file__).parent.glob("*.py")
            if path != Path(__file__) and patching.search(path.read_text("utf-8"))]
    assert not used


@pytest.mark.contract
@pytest.mark.parametrize("argv", [["ruff", "check", "."], ["mypy"]], ids=lambda a: a[0])
def test_the_linters_are_content(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True,
                          text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
