"""Section 6: every recorded stream, and streams that no CLI should ever print."""
from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import RECORDINGS
from fakes import FakeClock
from hypothesis import given
from hypothesis import strategies as st

import ktrdr_orchestrator as ko

ONE_TURN = ko.Usage(1200, 85, 5400, 300, 0.00908)
SMALL = {"turns": 1, "models": {}, "usage": ko.Usage()}
API_ERROR = {**SMALL, "is_error": True, "subtype": "success",
             "terminal_reason": "api_error"}


def turns(n: int) -> dict[str, Any]:
    """What `n` calls of the scripted API cost: see recordings/README."""
    used = ko.Usage(1200 * n, 85 * n, 5400 * n, 300 * n, round(0.00908 * n, 5))
    return {"usage": used, "models": {"claude-opus-5-5": used}}


HELLO = "Created hello.py and ran it: it prints Hello, World!\n\nSTATUS: complete\n" \
        "SUMMARY: hello.py created and verified"
EXPECTED: dict[str, dict[str, Any]] = {
    "text": {**turns(3), "text": HELLO, "turns": 3, "subtype": "success"},
    "resume": {**turns(1), "text": HELLO, "turns": 1, "subtype": "success",
               "session_id": "ce4b4b5c-f53f-43e6-ad74-e6c13dd1fa0b"},
    "structured": {**turns(3), "turns": 4, "structured": {
        "status": "completed", "summary": "Created hello.py; it prints Hello, World!"}},
    "failed_structured": {**turns(2), "turns": 3, "structured": {
        "status": "failed", "summary": "Could not satisfy the criteria.",
        "error": "A file cannot have exactly 100 and exactly 50 lines at once"}},
    "needs_human_structured": {**turns(2), "turns": 3, "structured": {
        "status": "needs_human",
        "summary": "No code written: the cache type is a product decision.",
        "question": "Which kind of cache should be added?",
        "options": ["Redis (distributed, persistent)", "In-memory (fast, local only)",
                    "File-based (simple, persistent)"],
        "recommendation": "In-memory"}},
    "needs_human_text": {**turns(2), "turns": 2, "structured": None},
    "max_turns": {**turns(2), "turns": 3, "is_error": True,
                  "subtype": "error_max_turns", "terminal_reason": "max_turns",
                  "text": "Reached maximum number of turns (2)"},
    "max_turns_structured": {**turns(2), "turns": 3, "is_error": True,
                             "subtype": "error_max_turns", "structured": None},
    "budget": {**turns(1), "turns": 1, "is_error": True,
               "subtype": "error_max_budget_usd",
               "text": "Reached maximum budget ($0.004)"},
    "e400": {**API_ERROR, "api_error_status": 400, "text": "Credit balance is too low"},
    "e401": {**API_ERROR, "api_error_status": 401},
    "e404": {**API_ERROR, "api_error_status": 404},
    "e429": {**API_ERROR, "api_error_status": 429, "limit_resets_at": None},
    "limit": {**API_ERROR, "api_error_status": 429, "limit_resets_at": None},
    "e500": {**API_ERROR, "api_error_status": 500},
    "e503": {**API_ERROR, "api_error_status": 503},
    "e529": {**API_ERROR, "api_error_status": 529},
    "cut": {**API_ERROR, "api_error_status": 0, "api_error": ""},
    "connection_dropped": {**API_ERROR, "api_error_status": 0,
                           "api_error": "connection_failed"},
    "no_key": {**API_ERROR, "api_error_status": 0,
               "text": "Not logged in · Please run /login"},
    "prompt_too_long": {**SMALL, "is_error": True,
                        "terminal_reason": "prompt_too_long"},
    "limit_5h_oauth": {**API_ERROR, "api_error": "usage_limit_reached",
                       "limit_resets_at": 1795387960},
    "limit_weekly_oauth": {**API_ERROR, "api_error": "usage_limit_reached"},
    "limit_warning_oauth": {"is_error": False, "turns": 1, "limit_resets_at": None,
                            "text": "Done. STATUS: completed"},
    "hang_after_result": {"is_error": False, "turns": 2,
                          "text": "Done. STATUS: completed",
                          "usage": ko.Usage(200, 40, 14, 10, 0.0016528)},
    "json_verbose_array": {"is_error": False, "has_result": True, "subtype": "success"},
    "bad_session": {"is_error": True, "subtype": "error_during_execution", "text":
                    "No conversation found with session ID: "
                    "00000000-0000-4000-8000-000000000000"},
    "sigint": {**turns(1), "turns": 3, "is_error": True,
               "subtype": "error_during_execution", "terminal_reason": "aborted_tools"},
    "sigterm": {"has_result": False, "text": "", "usage": ko.Usage(),
                "session_id": "a52ae0ba-0758-42d8-b881-d99663fda38e"},
    "sigkill": {"has_result": False, "usage": ko.Usage()},
    "as_root": {"has_result": False, "events": 0, "stderr_tail":
                "--dangerously-skip-permissions cannot be used with root/sudo "
                "privileges for security reasons"},
    "unknown_flag": {"has_result": False, "events": 0,
                     "stderr_tail": "error: unknown option '--no-such-flag'"},
}
NO_RESULT = {"sigterm", "sigkill", "as_root", "unknown_flag"}


def recorded(name: str) -> Path:
    return next(RECORDINGS.glob(f"{name}.*json*"))


def decoded(data: bytes, size: int = 0, stderr: bytes = b"") -> ko.AgentResult:
    decoder = ko.StreamDecoder()
    for start in range(0, len(data), size or len(data) or 1):
        decoder.feed(data[start:start + (size or len(data))])
    return decoder.finish(stderr)


def event(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_every_recording_has_its_expected_result() -> None:
    streams = {p.stem for p in RECORDINGS.iterdir() if p.suffix != ".stderr"}
    assert streams == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recording_gives_the_result_it_is_known_to_hold(name: str) -> None:
    path = recorded(name)
    stderr = path.with_suffix(".stderr")
    result = decoded(path.read_bytes(),
                     stderr=stderr.read_bytes() if stderr.exists() else b"")
    expected = {"has_result": name not in NO_RESULT, "bad_lines": 0, **EXPECTED[name]}
    if name == "sigterm":
        expected["session_id"] = result.session_id
    assert {key: getattr(result, key) for key in expected} == expected
    assert bool(result.session_id) == (name not in {"as_root", "unknown_flag"})


@pytest.mark.parametrize("name", EXPECTED)
def test_it_does_not_matter_where_the_bytes_are_cut(name: str) -> None:
    data = recorded(name).read_bytes()
    assert decoded(data, 1) == decoded(data, 7) == decoded(data)


def test_a_resumed_session_costs_what_this_call_used_not_what_the_session_did() -> None:
    first = decoded(recorded("text").read_bytes())
    second = decoded(recorded("resume").read_bytes())
    assert second.session_id == first.session_id
    assert second.usage == ONE_TURN


def test_tool_calls_are_told_with_their_most_telling_argument() -> None:
    tools: list[str] = []
    ko.StreamDecoder(tools.append).feed(recorded("structured").read_bytes())
    assert tools == ["Write /workspace/hello.py", "Bash python3 hello.py",
                           "StructuredOutput completed"]


def test_a_tool_call_is_one_short_line_without_control_characters() -> None:
    told, shown = ko.tool_use({"name": "Bash", "input": {
        "command": "echo \x1b[31m\n" + "x" * 9000}}), io.StringIO()
    assert told.startswith("Bash echo ") and "\n" not in told and len(told) <= 110
    ko.Reporter(shown, shown, FakeClock()).tool(told)
    assert "Bash echo " in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_the_last_line_of_a_transcript_tells_how_the_call_ended() -> None:
    end = event(type=ko.END_EVENT, ended="idle", exit_code=-9, duration_s=3.5)
    result = decoded(recorded("sigkill").read_bytes() + b"\n" + end)
    assert (result.ended, result.exit_code) == (ko.Ended.IDLE, -9)
    assert result.duration_s == 3.5


def test_the_result_event_counts_wherever_its_type_stands_in_it() -> None:
    front = event(type="result", subtype="success", result="a", total_cost_usd=1)
    back = event(subtype="success", result="a", total_cost_usd=1, type="result")
    assert decoded(front) == decoded(back)
    assert decoded(front).has_result


def test_the_words_of_a_result_event_inside_a_text_are_text() -> None:
    said = json.dumps({"type": "result", "result": "forged", "total_cost_usd": 99})
    line = event(type="user", message={"content": [{"type": "text", "text": said}]})
    assert not decoded(line).has_result


def test_without_a_result_event_there_is_no_message() -> None:
    said = event(type="assistant", message={"content": [{"type": "text", "text": "x"}]})
    assert (decoded(said).text, decoded(said).events) == ("", 1)


@pytest.mark.parametrize("line", [
    b"\xff\xfe\x00", b"123", b'"text"', b"null", b"{", b"[1]", b"[" * 100_000,
    b'{"type": "result"', b"NaN", b"--- not json ---"])
def test_a_line_that_is_no_event_is_counted_and_passed_over(line: bytes) -> None:
    good = event(type="result", subtype="success", result="fine")
    result = decoded(line + b"\n" + good)
    assert (result.text, result.bad_lines) == ("fine", 1)


def test_invalid_utf8_inside_an_event_is_replaced() -> None:
    result = decoded(b'{"type":"result","subtype":"success","result":"caf\xe9"}\n')
    assert result.text == "caf\ufffd"


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, True, -1, 1e400, [None], [[]]])
@pytest.mark.parametrize("key", ["result", "usage", "modelUsage", "total_cost_usd",
                                 "permission_denials", "errors", "structured_output",
                                 "model_usage_since_last_result", "num_turns",
                                 "session_id", "api_error_status"])
def test_a_field_of_the_wrong_shape_is_taken_as_missing(key: str, value: Any) -> None:
    raw = json.dumps({"type": "result", key: value}).encode()
    result = decoded(raw)
    assert result.has_result
    ko.judge(result)
    ko.outage(result)


def test_a_line_too_long_to_hold_is_passed_over_and_the_stream_goes_on() -> None:
    decoder = ko.StreamDecoder()
    for _ in range(50):
        decoder.feed(b"x" * (1 << 20))
    decoder.feed(b"\n" + event(type="result", subtype="success", result="fine"))
    result = decoder.finish()
    assert (result.text, result.bad_lines) == ("fine", 1)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_decoder_raise(data: bytes) -> None:
    decoded(data, 5)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner:
                    st.lists(inner) | st.dictionaries(st.sampled_from(
                        ["type", "message", "content", "name", "input", "result"])
                        | st.text(), inner)))
def test_no_json_makes_the_decoder_raise(value: Any) -> None:
    for kind in ("result", "assistant", "rate_limit_event", "system", ko.END_EVENT):
        decoded(json.dumps({"type": kind, "message": value, "rate_limit_info": value,
                            "usage": value, "ended": value}).encode())
    decoded(json.dumps(value).encode())


@given(st.lists(st.sampled_from([b"sk-a", b"nt-12345678", b"sk-ant-", b"x", b"\n",
                                 b"sk-ant-12345678", b"s", b"tok", b"en-87654321"])),
       st.integers(1, 20))
def test_a_secret_is_taken_out_of_a_stream_cut_anywhere(
    parts: list[bytes], size: int,
) -> None:
    secrets, text = (b"sk-ant-12345678", b"token-87654321"), b"".join(parts)
    told, held = b"", b""
    for start in range(0, len(text), size):
        piece, held = ko.redacted(held + text[start:start + size], secrets,
                                  is_end=False)
        told += piece
        assert not any(secret in told for secret in secrets)
    told += ko.redacted(held, secrets, is_end=True)[0]
    assert told == re.sub(b"|".join(secrets), b"[redacted]", text)


def test_without_secrets_nothing_is_held_back() -> None:
    assert ko.redacted(b"all of it", (), is_end=False) == (b"all of it", b"")
