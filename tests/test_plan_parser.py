"""Plan markdown in, tasks, E2E scenario, warnings and errors out."""
from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ktrdr_orchestrator as ko

FULL = """\
---
milestone: M1-demo
owner: "somebody"
---
# Milestone 1: Greetings

**Branch:** `feature/greetings` (from main)
**Builds on:** nothing

Users want to be greeted.

## E2E Test Scenario

```bash
greet World
## not a heading
```

**Verify:** `greet World | grep -q World`

## Task 1.1: Add a `greet` command

**Files:** `src/greet.py`, `tests/test_greet.py`
**Type:** CODING
**Timeout:** 15m
**Model:** `opus`

**Description:** It greets.

**Acceptance Criteria:**
- [ ] greets by name
  even with a long one
- [ ] without a name greets the world

**Verify:**

```bash
pytest -q tests/test_greet.py
test -s src/greet.py
```

---

### Task 1.2a — Say goodbye
**Acceptance Criteria:**
1. says goodbye

**Verify:** `make lint` and `make test`, then read the output of `make lint`

---
"""


def parse(text: str, name: str = "M1_demo.md") -> ko.Plan:
    return ko.parse_plan(text, path=Path("plans") / name)


def ids(text: str) -> list[str]:
    return [task.id for task in parse(text).tasks]


def messages(problems: tuple[ko.Problem, ...]) -> str:
    return "\n".join(f"{p.line}: {p.message}" for p in problems)


def with_tasks(*headings: str) -> str:
    return "# Plan\n\n" + "\n\nText.\n\n".join(headings) + "\n"


def test_a_full_plan_is_read_completely() -> None:
    plan = parse(FULL)
    first, second = plan.tasks
    assert (plan.milestone, plan.title) == ("M1-demo", "Milestone 1: Greetings")
    assert plan.branch == "feature/greetings"
    assert plan.context.startswith("**Branch:**") and plan.context.endswith("greeted.")
    assert not plan.errors
    assert (first.id, first.title) == ("1.1", "Add a greet command")
    assert first.type == "CODING"
    assert first.files == ("src/greet.py", "tests/test_greet.py")
    assert first.criteria == ("greets by name even with a long one",
                              "without a name greets the world")
    assert first.gates == ("pytest -q tests/test_greet.py\ntest -s src/greet.py",)
    assert (first.timeout_s, first.model) == (900.0, "opus")
    assert (second.id, second.title) == ("1.2a", "Say goodbye")
    assert second.gates == ("make lint", "make test")
    assert second.criteria == ("says goodbye",)


def test_text_and_lines_are_those_of_the_file() -> None:
    plan, lines = parse(FULL), FULL.split("\n")
    assert plan.e2e is not None
    sections: list[ko.Task] = [*plan.tasks, plan.e2e]
    for section in sections:
        assert section.text == "\n".join(lines[section.line - 1:section.end_line])
    assert plan.tasks[0].text.endswith("```") and plan.tasks[1].line == 44
    assert plan.e2e.title == "E2E Test Scenario"
    assert plan.e2e.gates == ("greet World | grep -q World",)


@pytest.mark.parametrize(("heading", "task_id", "title"), [
    ("## Task 1.1: Title", "1.1", "Title"),
    ("#### TASK-2.3a: Title", "2.3a", "Title"),
    ("### Task #7 - Title", "7", "Title"),
    ("### Task 1.2. Title", "1.2", "Title"),
    ("### Task 1.2, Title", "1.2", "Title"),
    ("### Task 3：Title", "3", "Title"),
    ("### ✅ Task 1.1 – Title", "1.1", "Title"),
    ("### [x] Task 1.1: Title", "1.1", "Title"),
    ("### Task 1.1 [x] — Title", "1.1", "Title"),
    ("### Task 1.1 (optional): Title", "1.1", "Title"),
    ("### [P1] Task QA-1: Title", "QA-1", "Title"),
    ("### 4.1 Task 1.0: Title", "1.0", "Title"),
    ("### ~~Task B2: Title~~ → moved", "B2", "Title → moved"),
    ("### **Task T033-MIN: Title**", "T033-MIN", "Title"),
    ("### Task A.1: Title", "A.1", "Title"),
    ("### Task 6b-3a: Title", "6b-3a", "Title"),
    ("### Task 1.2A.1: Title ###", "1.2A.1", "Title"),
    ("##Task 1.1: Title", "1.1", "Title"),
])
def test_a_task_heading_may_be_written_in_many_ways(
    heading: str, task_id: str, title: str,
) -> None:
    plan = parse(with_tasks(heading))
    assert [(task.id, task.title) for task in plan.tasks] == [(task_id, title)]
    assert not plan.errors


@pytest.mark.parametrize("heading", [
    "## Task 1.1 Complete: Title", "## Task 7 Breakdown", "## Notes (Task 1.1)",
    "## Taskmaster: x", "    ## Task 1.1: in a code block", "> ## Task 1.1: quoted",
    "## Tasks", "<!-- \n## Task 1.1: hidden\n-->", "~~~\n## Task 1.1: fenced\n~~~",
    "Task 1.1: no heading", "Task 1.1: underlined\n---",
])
def test_what_only_mentions_a_task_is_none(heading: str) -> None:
    plan = parse(with_tasks(heading))
    assert not plan.tasks
    assert messages(plan.errors).count("no task heading") == 1


@pytest.mark.parametrize(("body", "message", "hint"), [
    ("## Task 1.1: a\n\n## Task 1.1: b", "5: 1.1 is also in line 3", "another id"),
    ("## Task 1.1: ✅", "3: no title", "## Task 1.1:"),
    ("## Task 1.1: a\n\n## Task 1.2-1.4: b", "5: several tasks in one", "split"),
    ("## Task 1.1: a\n\n## Tasks 1.2 and 1.3: b", "5: several tasks in one", "split"),
    ("## Task 1.1: a\n\n## Task 1.2", "5: not a task", "## Task 1.2: Title"),
    ("## Task 1.1: a\n\n## Task 1.2 Add b", "5: not a task", "## Task 1.2: Add b"),
    ("## Task 1.1: a\n\n```\n## Task 1.2: b", "5: this never ends: ```", "close it"),
    ("## Task 1.1: a\n\n<!-- b\n## Task 1.2: b", "5: this never ends: <!--", "close"),
    ("## Task 1.1: a\n\n```\nopen", "5: this never ends: ```", "close it"),
    ("## Task 1.1: a\n\n<!-- open", "5: this never ends: <!--", "close it"),
    ("## Task 1.1: a\n**Timeout:** soon", "3: bad **Timeout:**", "90s"),
    ("## Task 1.1: a\n**Timeout:**", "3: bad **Timeout:**", "90s"),
    ("## Task 1.1: a\n**Timeout:** 500ms", "3: bad **Timeout:**", "90s"),
    ("- [ ] T001 Add a thing\n- [ ] T002 More", "3: no task heading; the nearest miss: "
     "- [ ] T001 Add a thing", "## Task 1.1: Title"),
    ("## Notes\n### 0.1 Add a thing", "4: no task heading; the nearest miss: ###", ""),
    ("### 任務 1.1：推送", "3: no task heading; the nearest miss: ### 任務 1.1", ""),
    ("nothing here", "1: no task heading", "## Task 1.1: Title"),
])
def test_errors_name_the_line_and_what_to_write(
    body: str, message: str, hint: str,
) -> None:
    errors = parse(f"# Plan\n\n{body}\n").errors
    assert len(errors) == 1
    assert message in messages(errors) and hint in errors[0].hint


@pytest.mark.parametrize(("body", "message"), [
    ("## Task 1.1: a\n\n#### Task 1.2 context", "5: not a task heading: Task 1.2"),
    ("## Task 1.1: a\n\n**Task 5.1**: b", "5: not a task heading: **Task 5.1**"),
    ("## Task 1.1: a\n\n### Setup (Task 5.1)", "5: not a task heading: Setup"),
    ("## Task 1.1: a ✅", "3: 1.1 is marked, but marks do not count"),
    ("## Task 1.1: a\n## Task 1.2: b", "1: no acceptance criteria: 1.1, 1.2"),
    ("## Task 1.1: a\n**Verify:** it looks good", "3: Verify: no command"),
    ("## Task 1.1: a\n**Verify:**\n```python\n1\n```", "3: Verify: no command"),
])
def test_oddities_are_warnings(body: str, message: str) -> None:
    plan = parse(f"# Plan\n\n{body}\n")
    assert not plan.errors
    assert message in messages(plan.warnings)


def test_a_heading_about_a_task_that_is_there_is_no_problem() -> None:
    plan = parse("## Task 1.1: a\n**Done when:** b\n## Task 1.1 Complete\n")
    assert not plan.errors and not plan.warnings


def test_a_name_that_sounds_like_a_report_is_a_warning() -> None:
    plan = parse("# Plan\n\n## Task 1.1: a\n", name="HANDOFF_M1.md")
    assert "sounds like a report" in messages(plan.warnings)


NESTED = """\
# Plan
## Task 1.1: a
```markdown
```bash
{inside}
```
{middle}
```
## Task 1.2: b
"""


def test_a_fence_with_an_info_string_nests() -> None:
    assert ids(NESTED.format(inside="x", middle="## Task 1.1: an example")) == [
        "1.1", "1.2"]


def test_two_plausible_readings_of_fences_are_an_error() -> None:
    text = NESTED.format(inside="x", middle="## Task 9.9: an example, or a task?")
    plan = parse(f"{text}```bash\nls\n```\n")
    assert [task.id for task in plan.tasks] == ["1.1", "1.2"]
    assert "read in two ways" in messages(plan.errors)
    assert "four backticks" in plan.errors[0].hint


def test_a_forgotten_closing_fence_falls_back_to_commonmark() -> None:
    plan = parse("# P\n## Task 1.1: a\n```markdown\n```bash\nx\n```\n## Task 1.2: b\n")
    assert [task.id for task in plan.tasks] == ["1.1", "1.2"]
    assert not plan.errors and "read in two ways" in messages(plan.warnings)


@pytest.mark.parametrize(("heading", "marked"), [
    ("Task 1.1: a", False), ("Task 1.1: a ✅", True), ("[x] Task 1.1: a", True),
    ("Task 1.1: a — DONE", True), ("Task 1.1: a (completed)", True),
    ("~~Task 1.1: a~~", True), ("Task 1.1: a (DEFERRED)", True),
    ("Task 1.1: a [SKIP]", True), ("[ ] Task 1.1: a", False),
    ("Task 1.1: Complete rewrite (complete rewrite)", False),
    ("Task 1.1: a ✅ (IN PROGRESS)", False), ("Task 1.1: Mark orders done", False),
])
def test_marks_are_read_from_the_heading(heading: str, marked: bool) -> None:
    assert parse(with_tasks(f"## {heading}")).tasks[0].marked is marked


@pytest.mark.parametrize(("body", "criteria"), [
    ("**Acceptance Criteria:**\n* a\n\n* b\n\n**Notes:**\n- c", ("a", "b")),
    ("**Acceptance Criteria:** all of\n\n- a\n  - a2\n- b\n\nNote\n- c",
     ("a - a2", "b")),
    ("**Success Criteria:**\n- a\n\n**Acceptance Criteria:**\n- b", ("a", "b")),
    ("#### Acceptance Criteria\n- [x] a\n---\n#### Notes\n- b", ("a",)),
    ("- **Done when**: it works", ("it works",)),
    ("Acceptance Criteria:\n- [ ] **Bold** item\n- [ ] **Verify**: by hand",
     ("**Bold** item", "**Verify**: by hand")),
    ("**Acceptance Criteria:**\n- a\n```\n- no\n```\n- b", ("a", "b")),
])
def test_criteria_are_the_items_under_their_label(
    body: str, criteria: tuple[str, ...],
) -> None:
    assert parse(with_tasks(f"## Task 1.1: a\n\n{body}")).tasks[0].criteria == criteria


@pytest.mark.parametrize(("body", "gates"), [
    ("**Verify:** `a b`", ("a b",)),
    ("**Verify**: `a`; `b` and then read `c`", ("a", "b")),
    ("**Verify:** `a` and  `b`, then `c`; see `d`", ("a", "b", "c")),
    ("**Verify:**\n- `a`\n```\nout\n```\n---\n- `b`", ("a", "b")),
    ("- **Verify:** ``echo `date` `` shows the date", ("echo `date`",)),
    ("**Verify:**\n- `a`\n- `b` (slow)\n\nThen `c` is used.", ("a", "b")),
    ("**Verify:**\n\n  ```sh\n  a \\\n    b\n  c\n  ```", ("a \\\n  b\nc",)),
    ("**Verify:** run `a`", ()),
    ("**Verify:**\n```sh\n\n  \n```", ()),
    ("**Verify:** `a` prints\n```\n{}\n```", ("a",)),
    ("**Verify:** see below\n\nFirst of all\n- `a`", ()),
])
def test_gates_are_commands_in_code(body: str, gates: tuple[str, ...]) -> None:
    assert parse(with_tasks(f"## Task 1.1: a\n\n{body}")).tasks[0].gates == gates


@pytest.mark.parametrize(("value", "seconds"), [
    ("600", 600), ("90s", 90), ("15m", 900), ("`2h`", 7200),
])
def test_a_timeout_has_a_unit(value: str, seconds: float) -> None:
    task = parse(f"## Task 1.1: a\n**Timeout:** {value}\n").tasks[0]
    assert task.timeout_s == seconds


@pytest.mark.parametrize(("text", "heading"), [
    ("## Validation\nx\n## E2E Test\nx\n## Task 1.1: a", "E2E Test"),
    ("## Task 1.1: a\n### E2E Test\nx\n## E2E Validation\nx", "E2E Validation"),
    ("## Task 1.1: a\n## Milestone 1 Verification\nx\n### E2E Test\ny", "E2E Test"),
    ("## Task 1.1: a\n## Validation\n- [ ] box\n- [ ] box", None),
    ("## Phase 2: End-to-end verification\n### Task 1.1: a", None),
    ("## Task 1.1: a\n# Post-M4: Final\n## Post-M4: Final Verification\nx",
     "Post-M4: Final Verification"),
    ("## Task 1.1: a", None),
])
def test_the_e2e_section_is_the_best_heading_outside_tasks(
    text: str, heading: str | None,
) -> None:
    e2e = parse(f"# Plan\n{text}\n").e2e
    assert (e2e and e2e.title) == heading


@pytest.mark.parametrize(("value", "milestone"), [
    ("M1.2_b-3", "M1.2_b-3"), ("'M 1: x'  # note", "M-1-x"), ("../x", "x"), (".x", "x"),
    ("a/b", "a-b"), ("a..b", "a-b"), ("x.", "x"), ("", "plan"), ("x" * 101, "x" * 100),
])
def test_a_milestone_is_made_fit_to_name_files(value: str, milestone: str) -> None:
    plan = parse(f"---\nmilestone: {value}\n---\n# P\n\n## Task 1.1: a\n")
    assert plan.milestone == milestone
    assert not plan.errors


@pytest.mark.parametrize(("value", "branch"), [
    ("`feature/x`", "feature/x"), ("go on with `m1/a-b` here", "m1/a-b"), ("-x y", "x"),
    ("`a/../b`", "a-b"), ("`a b`", "a-b"), ("", ""), ("`feature/#1`", "feature/#1"),
])
def test_a_branch_is_made_fit_for_git(value: str, branch: str) -> None:
    assert parse(f"**Branch:** {value}\n## Task 1.1: a\n").branch == branch


def test_without_front_matter_the_stem_names_the_milestone_safely() -> None:
    assert parse("## Task 1.1: a", name="M 1 (new).v2.md").milestone == "M-1-new-v2"
    assert parse("## Task 1.1: a", name="….md").milestone == "plan"


@pytest.mark.parametrize(("data", "message"), [
    (b"\xff\xfeT\0", "1: no UTF-8 text: byte 0xff"),
    (b"a\nb\0", "2: no UTF-8 text: byte 0x00"), (b"---\nmilestone: \xe9\n---\n",
                                               "2: no UTF-8 text: byte 0xe9"),
])
def test_bytes_that_are_no_utf8_text_are_an_error(
    tmp_path: Path, data: bytes, message: str,
) -> None:
    (tmp_path / "M1.md").write_bytes(data + b"\n# P\n\n## Task 1.1: a\n")
    plan = ko.named_plan(str(tmp_path / "M1.md"))
    assert messages(plan.errors) == message
    json.dumps(dataclasses.asdict(plan), default=str)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "M1.md").write_bytes(b"\xef\xbb\xbf# T\n")
    assert ko.named_plan(str(tmp_path / "M1.md")).title == "T"


PIECES = st.sampled_from([
    "# T", "## Task 1.1: a", "### Task 1.2 — b", "## Task 1.1", "## Tasks 1-2: x",
    "```", "```bash", "````md", "~~~", "<!--", "-->", "---", "===", "", "text",
    "- [ ] a", "  - b", "**Acceptance Criteria:**", "**Verify:** `a`",
    "**Verify:**", "**Files:**", "**Timeout:** x", "## E2E Test", "## Validation", "# ",
    "**Branch:** ``",
    "`", "|", "milestone: x",
])
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("\n".join))


@given(TEXTS)
def test_no_text_makes_it_raise_and_lines_are_in_order(text: str) -> None:
    plan = parse(text)
    total = len(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    ends = [0]
    for task in plan.tasks:
        assert ends[-1] < task.line <= task.end_line <= total
        ends.append(task.end_line)
    for problems in (plan.warnings, plan.errors):
        assert [p.line for p in problems] == sorted(p.line for p in problems)
        assert all(1 <= p.line <= total and p.message for p in problems)
    assert all(p.hint for p in plan.errors)
    assert plan.tasks or plan.errors
    json.dumps(dataclasses.asdict(plan), default=str)


@given(TEXTS)
def test_line_ends_make_no_difference(text: str) -> None:
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    assert parse(unix.replace("\n", "\r\n")) == parse(unix)


WORDS = st.text("abcxyz", min_size=1, max_size=8).filter(lambda word: word != "x")
TITLES = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)
NUMBERS = st.integers(0, 99)
TASKS = st.lists(
    st.tuples(st.builds("{}.{}".format, NUMBERS, NUMBERS), TITLES, st.lists(TITLES)),
    min_size=1, max_size=8, unique_by=lambda task: task[0])


@given(TASKS, st.sampled_from(["##", "####"]), st.sampled_from([":", " —", " -"]))
def test_a_generated_plan_comes_back(
    tasks: list[tuple[str, str, list[str]]], hashes: str, separator: str,
) -> None:
    text = "# Plan\n\n" + "".join(
        f"{hashes} Task {task_id}{separator} {title}\n\n**Acceptance Criteria:**\n"
        + "".join(f"- [ ] {item}\n" for item in items) + "\n---\n\n"
        for task_id, title, items in tasks)
    plan = parse(text)
    assert not plan.errors
    assert [(t.id, t.title, list(t.criteria)) for t in plan.tasks] == tasks


@pytest.mark.slow
def test_hostile_and_huge_input_takes_linear_time() -> None:
    size = 200_000
    units = ("#", "*", "`", "[", "- [ ] ", "~", "<!--", "1.1-", "✅ ", "(", " ", "`a` ")
    heads = ("", "## ", "## Task 1.1: ", "## Task 1.1 ", "**Verify:** ", "**Files:** ")
    lines = ("# a", "## Task 1.1: x", "## E2E Test", "```sh", "<!-- x", "- a", "**a:**")
    texts = [head + unit * (size // len(unit)) for unit in units for head in heads]
    texts += [f"## Task 1.1: x\n{line}\n" * (size // 20) for line in lines]
    texts.append(FULL.replace("---\n", "\n") * (10_000_000 // len(FULL)))
    texts.append("---\n" + "milestone: x # y\n" * (size // 20))
    texts.append(f"## Task 1.1: x\n**Verify:**\n```{' ' * size}x\n```\n")
    for text in texts:
        start = time.process_time()
        parse(text)
        assert time.process_time() - start < 5 + len(text) / 1_000_000, text[:40]
