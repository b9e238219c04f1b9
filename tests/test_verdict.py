"""The verdict on what an agent left behind: outage and judge."""
from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
from conftest import RECORDINGS
from hypothesis import given
from hypothesis import strategies as st

import ktrdr_orchestrator as ko

COMPLETED = ko.VerdictStatus.COMPLETED
FAILED = ko.VerdictStatus.FAILED
NEEDS_HUMAN = ko.VerdictStatus.NEEDS_HUMAN
RETRY, LIMIT, PERSON = ko.OutageKind.RETRY, ko.OutageKind.LIMIT, ko.OutageKind.PERSON


DIED = ko.AgentResult(ended=ko.Ended.EXIT, exit_code=1)
DONE = "It prints Hello, World!\n\nSTATUS: complete\nSUMMARY: hello.py created"
QUESTION = {"status": "needs_human", "summary": "No key.", "question": "Which key?",
            "options": ["one", "two"], "recommendation": "two"}


def said(text: str, **fields: Any) -> ko.AgentResult:
    """An agent that ended well with these words."""
    values = {"ended": ko.Ended.EXIT, "exit_code": 0, "has_result": True, "text": text,
              "subtype": "success", "terminal_reason": "completed", "events": 5}
    return ko.AgentResult(**{**values, **fields})


def broke(text: str = "", **fields: Any) -> ko.AgentResult:
    """A call whose result event is an error of the API."""
    return said(text, **{"exit_code": 1, "is_error": True,
                         "terminal_reason": "api_error", **fields})


def recorded(name: str) -> ko.AgentResult:
    """A recording of the CLI, decoded; the process then ended with 1 or by a signal."""
    decoder = ko.StreamDecoder()
    path = next(RECORDINGS.glob(f"{name}.*json*"))
    decoder.feed(path.read_bytes())
    stderr = path.with_suffix(".stderr")
    return dataclasses.replace(
        decoder.finish(), ended=ENDED.get(name, ko.Ended.EXIT), exit_code=1,
        duration_s=9, stderr_tail=stderr.read_text() if stderr.exists() else "")


ENDED = {"sigint": ko.Ended.STOPPED, "sigterm": ko.Ended.STOPPED,
         "hang_after_result": ko.Ended.GRACE}
RECORDED_VERDICTS = {
    "text": (COMPLETED, "marker", "hello.py created and verified"),
    "resume": (COMPLETED, "marker", "hello.py created and verified"),
    "json_verbose_array": (COMPLETED, "marker", "hello.py created and verified"),
    "structured": (COMPLETED, "structured", "it prints Hello, World!"),
    "failed_structured": (FAILED, "structured", "exactly 100 and exactly 50 lines"),
    "needs_human_structured": (NEEDS_HUMAN, "structured", "No code written"),
    "needs_human_text": (NEEDS_HUMAN, "marker", "Which kind of cache"),
    "hang_after_result": (COMPLETED, "text_done", "Done."),
    "limit_warning_oauth": (COMPLETED, "text_done", "Done."),
    "max_turns": (FAILED, "max_turns", "turns (2)"),
    "max_turns_structured": (FAILED, "max_turns", "turns (2)"),
    "budget": (FAILED, "max_budget_usd", "$0.004"),
    "bad_session": (FAILED, "missing_session", "No conversation found"),
    "sigint": (FAILED, "stopped", "stopped after 9 s"),
    "sigterm": (FAILED, "stopped", "stopped after 9 s"),
    "sigkill": (FAILED, "no_result", "no result, exit status 1"),
    "as_root": (FAILED, "no_output", "root"),
    "unknown_flag": (FAILED, "no_output", "unknown option"),
}
RECORDED_OUTAGES = {
    "e400": PERSON, "e401": PERSON, "e404": PERSON, "no_key": PERSON,
    "prompt_too_long": PERSON, "e429": RETRY, "e500": RETRY, "e503": RETRY,
    "e529": RETRY, "cut": RETRY, "connection_dropped": RETRY, "limit": LIMIT,
    "limit_5h_oauth": LIMIT, "limit_weekly_oauth": LIMIT,
}


def test_every_recording_has_its_expected_verdict() -> None:
    names = {path.stem for path in RECORDINGS.iterdir()}
    assert names == {*RECORDED_VERDICTS, *RECORDED_OUTAGES}


@pytest.mark.parametrize("name", RECORDED_VERDICTS)
def test_a_recorded_call_gets_its_verdict_and_is_no_outage(name: str) -> None:
    status, rule, evidence = RECORDED_VERDICTS[name]
    verdict = ko.judge(recorded(name))
    assert (verdict.status, verdict.rule) == (status, rule)
    assert evidence in verdict.evidence
    assert ko.outage(recorded(name)) is None


@pytest.mark.parametrize("name", RECORDED_OUTAGES)
def test_a_recorded_outage_gets_its_kind_and_reset_time(name: str) -> None:
    result = recorded(name)
    assert ko.outage(result) == ko.Outage(RECORDED_OUTAGES[name], result.text,
                                          result.limit_resets_at)
    assert ko.judge(result).rule == "outage"
    assert (result.limit_resets_at is not None) == name.endswith("_oauth")


@pytest.mark.parametrize(("text", "kind"), [
    ("Claude AI usage limit reached|1795387960", LIMIT),
    ("You've hit your session limit · resets 8pm (Europe/Paris)", LIMIT),
    ("You're out of extra usage · resets 9pm", LIMIT),
    ("API Error: 529 {\"type\":\"overloaded_error\"}", RETRY),
    ("API Error: Connection error.", RETRY),
    ("API Error: 403 {\"Message\":\"expired\"} · Please run /login", PERSON),
    ("API Error (some-model): 400 The model identifier is invalid.", PERSON),
    ("API Error: UNABLE_TO_VERIFY_LEAF_SIGNATURE", PERSON),
])
def test_words_of_older_versions_count_in_an_error_and_only_there(
        text: str, kind: ko.OutageKind) -> None:
    error = broke(text, terminal_reason="")
    assert ko.outage(error) == ko.Outage(kind, text)
    assert ko.outage(said(text)) is None
    aborted = broke(text, terminal_reason="aborted_tools",
                    subtype="error_during_execution")
    assert ko.outage(aborted) is None


@pytest.mark.parametrize(("status", "kind"), [
    (400, PERSON), (402, PERSON), (403, PERSON), (408, RETRY), (409, RETRY),
    (413, PERSON), (429, RETRY), (502, RETRY), (504, RETRY),
])
def test_the_http_status_alone_decides(status: int, kind: ko.OutageKind) -> None:
    assert ko.outage(broke(api_error_status=status)) == ko.Outage(kind, "api_error")
    text = "Please run /login"
    assert ko.outage(broke(text, api_error_status=status)) == ko.Outage(kind, text)


def test_an_error_of_the_task_or_a_crash_is_no_outage() -> None:
    assert ko.outage(broke("the agent's own words", terminal_reason="")) is None
    assert ko.outage(ko.AgentResult(exit_code=1, stderr_tail="API Error: 529")) is None


@pytest.mark.parametrize("ended", [ko.Ended.TIMEOUT, ko.Ended.IDLE, ko.Ended.GRACE])
def test_a_result_that_arrived_counts_however_the_call_ended(ended: ko.Ended) -> None:
    assert ko.judge(said(DONE, ended=ended)).status is COMPLETED


@pytest.mark.parametrize("ended", [ko.Ended.TIMEOUT, ko.Ended.IDLE])
def test_a_call_that_we_cut_short_says_how(ended: ko.Ended) -> None:
    bare = ko.AgentResult(ended=ended, duration_s=61)
    aborted = said("", is_error=True, subtype="error_during_execution", ended=ended,
                   terminal_reason="aborted_tools", duration_s=61)
    for result in (bare, aborted):
        verdict = ko.judge(result)
        assert (verdict.status, verdict.rule) == (FAILED, ended.value)
        assert verdict.evidence == f"{ended.value} after 61 s"


@pytest.mark.parametrize(("result", "rule", "evidence"), [
    (DIED, "no_output", "no output, exit status 1"),
    (dataclasses.replace(DIED, bad_lines=1), "no_result", "no result, exit status 1"),
    (dataclasses.replace(DIED, stderr_tail="No conversation found with ID 1"),
     "missing_session", "No conversation found with ID 1"),
    (broke(terminal_reason="", text="TypeError"), "execution_error", "TypeError"),
])
def test_a_call_that_broke_names_the_rule_and_gives_evidence(
        result: ko.AgentResult, rule: str, evidence: str) -> None:
    assert ko.judge(result) == ko.Verdict(FAILED, rule, evidence)


@pytest.mark.parametrize("status", ["in progress", 3, None, "completed | failed", ""])
def test_an_unknown_structured_status_leaves_it_to_the_text(status: object) -> None:
    assert ko.judge(said(DONE, structured={"status": status})).rule == "marker"
    assert ko.judge(said(DONE, structured={"status": "Blocked."})).rule == "structured"


def test_a_structured_question_keeps_its_parts() -> None:
    verdict = ko.judge(said("", structured=QUESTION))
    assert verdict.question == ko.Question("Which key?", ("one", "two"), "two")
    verdict = ko.judge(said("", structured={**QUESTION, "question": "", "options": 3}))
    assert verdict.question == ko.Question("No key.", ("3",), "two")


@pytest.mark.parametrize(("text", "status"), [
    ("**STATUS:** completed", COMPLETED), ("status: Done", COMPLETED),
    ("> `STATUS: failed`\nERROR: broken", FAILED),
    ("## STATUS - x\nSTATUS: blocked", NEEDS_HUMAN),
    ("STATUS: needs human - no key", NEEDS_HUMAN),
    ("**Status**: ✅ Complete", COMPLETED),
    ("STATUS: needs_human\nQUESTION: A?\n\nSTATUS: completed", COMPLETED),
    ("STATUS: completed\nlater\nSTATUS: failed\nERROR: x", FAILED),
    ("```\n---LOOP---\nSTATUS: COMPLETE\nWORK_TYPE: DOCS\n---END---\n```", COMPLETED),
])
def test_a_status_marker_counts_and_the_last_one_wins(
        text: str, status: ko.VerdictStatus) -> None:
    verdict = ko.judge(said(text))
    assert (verdict.status, verdict.rule) == (status, "marker")


@pytest.mark.parametrize("text", [
    "STATUS: completed|failed|needs_human", "STATUS: IN_PROGRESS", "STATUS:",
    "STATUS: done with part one of three", "TESTS_STATUS: failed", "E2E_STATUS: failed",
    "The page shows STATUS: blocked for such users.",
])
def test_words_that_only_look_like_a_marker_do_not_count(text: str) -> None:
    assert ko.judge(said(f"I added the page.\n\n{text}")).rule != "marker"


def test_the_fields_of_a_block_may_span_lines() -> None:
    text = ("Some text. ERROR: old\n\nSTATUS: failed\nSUMMARY: half of it\n"
            "ERROR: ValueError: bad\n  at line 3\n---\nnot of the block")
    assert ko.judge(said(text)).evidence == "ValueError: bad\n  at line 3"


@pytest.mark.parametrize(("options", "expected"), [
    ("OPTIONS:\n- one\n- two", ("one", "two")), ("OPTIONS: one | two", ("one", "two")),
    ("OPTIONS: A) one, B) two", ("A) one", "B) two")), ("", ()),
    ("**Options:**\n\n1. one\n2. two", ("1. one", "2. two")),
])
def test_the_options_of_a_block_are_read_in_every_layout(
        options: str, expected: tuple[str, ...]) -> None:
    text = f"STATUS: needs_human\nQUESTION: Which?\n{options}\nRECOMMENDATION: two"
    assert ko.judge(said(text)).question == ko.Question("Which?", expected, "two")


def test_a_block_without_a_question_asks_with_the_message() -> None:
    text = "I need write permission for config/.\n\nSTATUS: BLOCKED"
    assert ko.judge(said(text)).question == ko.Question(text)


@pytest.mark.parametrize(("text", "rule", "status"), [
    ("", "empty", FAILED), (" \n", "empty", FAILED),
    ("Fixed the bug; I could not reproduce the second one.", "text_done", COMPLETED),
    ("The service listens on port 80.", "text_no_request", COMPLETED),
])
def test_other_prose_is_judged_by_whether_work_is_reported(
        text: str, rule: str, status: ko.VerdictStatus) -> None:
    verdict = ko.judge(said(text))
    assert (verdict.status, verdict.rule) == (status, rule)


E2E = {"status": "failed", "diagnosis": "The route is missing.", "options": [],
       "recommendation": "", "steps": ["curl /: 404"]}


def test_a_structured_e2e_failure_brings_its_diagnosis() -> None:
    assert ko.judge(said("", structured=E2E), "e2e_status") == ko.Verdict(
        FAILED, "structured", "The route is missing.")


def test_e2e_markers_are_read_when_there_is_no_structure() -> None:
    text = "Ran it.\n**E2E_STATUS:** Failed\nDIAGNOSIS: no route"
    verdict = ko.judge(said(text), "e2e_status")
    assert verdict == ko.Verdict(FAILED, "marker", "no route")
    fixable = ko.judge(said(f"{text}\nFIXABLE: yes\nFIX_PLAN: add it"), "e2e_status")
    assert fixable.fix_plan == "add it"
    lost = ko.judge(said(f"{text}\nFIXABLE: no\nFIX_PLAN: pray"), "e2e_status")
    assert (lost.status, lost.fix_plan) == (FAILED, "")
    passed = ko.judge(said("STATUS: failed\nE2E_STATUS: passed"), "e2e_status")
    assert (passed.status, passed.question) == (COMPLETED, None)


@pytest.mark.parametrize(("result", "rule"), [
    (said("All good, it passed."), "no_status"), (said(""), "no_status"),
    (said("", structured={"status": "fine"}), "no_status"),
    (said("", structured={**E2E, "status": "unclear"}), "structured"),
    (said("E2E_STATUS: perhaps"), "no_status"), (DIED, "no_output"),
])
def test_an_e2e_run_without_a_clear_word_is_put_to_a_person(
        result: ko.AgentResult, rule: str) -> None:
    verdict = ko.judge(result, "e2e_status")
    assert (verdict.status, verdict.rule) == (NEEDS_HUMAN, rule)
    assert verdict.question is not None and verdict.question.text


WORDS = st.sampled_from([
    "STATUS:", "QUESTION:", "OPTIONS:", "E2E_STATUS:", "failed", "needs_human", "\n",
    "?", "```", "---", "#", "**", "[A]", "- ", "</think>", "Please", "I need you", "？",
    " ", "\0", "Choose", "\u2028", "done", "1. ",
])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(text=st.text() | st.lists(WORDS | st.text(max_size=5)).map("".join),
       structured=st.none() | st.dictionaries(st.sampled_from([*E2E, *QUESTION]), JSON),
       is_error=st.booleans(), has_result=st.booleans())
def test_no_input_makes_it_raise_and_evidence_stays_short(
        text: str, structured: dict[str, Any] | None, is_error: bool,
        has_result: bool) -> None:
    result = said(text, structured=structured, is_error=is_error, has_result=has_result,
                  terminal_reason="")
    verdict = ko.judge(result)
    assert len(verdict.evidence) <= ko.EVIDENCE_CHARS
    assert (verdict.status is NEEDS_HUMAN) == (verdict.question is not None)
    assert len(ko.judge(result, "e2e_status").evidence) <= ko.EVIDENCE_CHARS
    ko.outage(result)


@pytest.mark.parametrize("unit", [
    "a", "`", "*", " ", "\n", "x?\n", "A_", "[A] ", "is now ", "I need the ", "</think",
    "STATUS: done\n", "QUESTION: a\n", "- a\n", "could you ", "API Error ", "```\n",
])
def test_a_megabyte_of_anything_is_judged_quickly(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    ko.judge(said(text))
    ko.judge(said(f"STATUS: needs_human\n{text}"))
    ko.outage(broke(text, terminal_reason=""))
    assert time.process_time() - started < 2.0


ASKED = {"type": "assistant", "message": {"content": [{
    "type": "tool_use", "name": "AskUserQuestion", "input": {"questions": [{
        "question": "Which database?", "header": "DB", "multiSelect": False,
        "options": [{"label": "SQLite", "description": "a file"},
                    {"label": "Postgres"}]}]}}]}}


def heard(**result: Any) -> ko.AgentResult:
    decoder = ko.StreamDecoder()
    event = {"type": "result", "subtype": "success", "is_error": False, **result}
    decoder.feed(f"{json.dumps(ASKED)}\n{json.dumps(event)}\n".encode())
    return decoder.finish()


def test_a_question_that_the_cli_refused_to_ask_is_asked_by_us() -> None:
    verdict = ko.judge(heard(result="I could not ask. I am done for now."))
    assert (verdict.status, verdict.rule) == (ko.VerdictStatus.NEEDS_HUMAN, "asked")
    assert verdict.question == ko.Question("Which database?", ("SQLite", "Postgres"))


def test_a_question_outranks_a_scenario_without_a_clear_word() -> None:
    verdict = ko.judge(heard(result="I could not ask."), "e2e_status")
    assert (verdict.status, verdict.rule) == (ko.VerdictStatus.NEEDS_HUMAN, "asked")
    assert verdict.question and verdict.question.options == ("SQLite", "Postgres")


def test_a_report_outranks_a_question_that_was_not_asked() -> None:
    report = {"status": "completed", "summary": "ok"}
    verdict = ko.judge(heard(structured_output=report))
    assert verdict.status is ko.VerdictStatus.COMPLETED


@pytest.mark.parametrize("questions", [None, [], "x", [None], [{}], [{"question": 3}]])
def test_a_malformed_question_is_survived(questions: object) -> None:
    decoder = ko.StreamDecoder()
    call = {"type": "tool_use", "name": "AskUserQuestion",
            "input": {"questions": questions}}
    event = {"type": "assistant", "message": {"content": [call]}}
    decoder.feed(json.dumps(event).encode() + b"\n")
    decoder.feed(b'{"type": "result", "result": "All done.", "is_error": false}\n')
    assert ko.judge(decoder.finish()).question is None or questions == [
        {"question": 3}]
