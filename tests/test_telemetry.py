"""Section 13: spans reach a backend, and a silent backend changes nothing."""
from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TEST_PLANS
from program import LOCAL, PROGRAM, Program
from receiver import OtlpReceiver
from scripted_api import ScriptedApi

import ktrdr_orchestrator as ko

HELLO = TEST_PLANS / "hello_world.md"
ERROR, CLIENT = 2, 3             # a span's status code; its kind


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield listening.getsockname()[1]


@pytest.mark.parametrize("environ, traces, metrics", [
    ({}, "", ""), ({"OTEL_EXPORTER_OTLP_ENDPOINT": "a"}, "a", "a"),
    ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "m"}, "", "m"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "t"},
     "t", "a"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_TRACES_EXPORTER": "none"}, "", "a"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_METRICS_EXPORTER": "console"}, "a", ""),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_SDK_DISABLED": "True"}, "", "")])
def test_the_standard_variables_say_where_a_signal_goes(
    environ: dict[str, str], traces: str, metrics: str,
) -> None:
    assert ko.endpoints(environ) == (traces, metrics)


def test_without_an_endpoint_it_is_off_and_imports_nothing() -> None:
    told: list[str] = []
    telemetry = ko.Telemetry({}, told.append, Path("m"))
    with telemetry.span("task", task="1.1") as note:
        note({"status": "completed"})
    telemetry.close()
    assert told == []


@pytest.mark.contract
def test_a_run_without_an_endpoint_imports_no_opentelemetry(repository: Any) -> None:
    code = ("import sys, ktrdr_orchestrator as ko; code = ko.main(sys.argv[1:]); "
            "sys.exit(code or any('opentelemetry' in m for m in sys.modules))")
    done = subprocess.run([sys.executable, "-c", code, "run", str(HELLO), *LOCAL],
                          env=Program(repository).environ | {"PYTHONPATH": str(ROOT)},
                          cwd=repository, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def attributes(span: Any) -> dict[str, Any]:
    """Without the prefix of our own."""
    return {a.key.removeprefix("orchestrator."): getattr(
        a.value, a.value.WhichOneof("value")) for a in span.attributes}


def tree(receiver: OtlpReceiver) -> list[tuple[str, str]]:
    """Names of the spans with their parents', in the order in which they began."""
    names = {s.span_id: s.name.removeprefix("orchestrator.") for s in receiver.spans}
    spans = sorted(receiver.spans, key=lambda s: s.start_time_unix_nano)
    return [(names[s.span_id], names.get(s.parent_span_id, "")) for s in spans]


def spans(receiver: OtlpReceiver, name: str) -> list[Any]:
    return [s for s in receiver.spans if s.name == f"orchestrator.{name}"]


TASK = [("task", "milestone"), ("claude_invoke", "task")]


@pytest.mark.contract
def test_the_spans_of_a_run_are_one_trace_in_their_hierarchy(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    assert program.run("run", TEST_PLANS / "e2e_will_pass.md", *LOCAL).returncode == 0
    assert tree(receiver) == [
        ("milestone", ""), ("sandbox_reset", "milestone"), *TASK, *TASK,
        ("e2e_test", "milestone"), ("claude_invoke", "e2e_test")]
    assert len({span.trace_id for span in receiver.spans}) == 1
    assert not any(span.status.code for span in receiver.spans)
    state = program.state("e2e_will_pass")
    (root,) = spans(receiver, "milestone")
    assert attributes(root) == {
        "milestone": "e2e_will_pass", "run": state["started_at"],
        "status": "completed", "cost_usd": state["cost_usd"]}
    about = attributes(spans(receiver, "task")[0])
    assert about == {"milestone": "e2e_will_pass", "task": "1.1",
                     "title": about["title"], "status": "completed"}


@pytest.mark.contract
def test_a_calls_span_tells_its_session_its_cost_and_its_word(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    (call,) = spans(receiver, "claude_invoke")
    (line,) = [entry for entry in program.ledger() if entry.get("session_id")
               and "kind" not in entry]
    tokens = line["tokens"]
    cached, made = tokens["cache_read"], tokens["cache_creation"]
    (model,) = line["models"]
    ours = ("task", "status", "rule", "ended", "turns", "cost_usd")
    assert attributes(call) == {name: line[name] for name in ours} | {
        "milestone": "hello_world", "number": line["attempt"],
        "gen_ai.operation.name": "invoke_agent", "gen_ai.provider.name": "anthropic",
        "gen_ai.agent.name": "claude-code", "gen_ai.response.model": model,
        "gen_ai.conversation.id": line["session_id"],
        "gen_ai.usage.input_tokens": tokens["input"] + cached + made,
        "gen_ai.usage.output_tokens": tokens["output"],
        "gen_ai.usage.cache_read.input_tokens": cached,
        "gen_ai.usage.cache_creation.input_tokens": made}
    assert call.kind == CLIENT


@pytest.mark.contract
def test_a_resumed_milestone_is_a_trace_of_its_own_linked_to_the_one_before(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    ambiguous = TEST_PLANS / "ambiguous_task.md"
    assert program.run("run", ambiguous, *LOCAL).returncode == 3
    (first,) = spans(receiver, "milestone")
    assert program.run("resume", ambiguous, "--answer", "a", *LOCAL).returncode == 0
    _, second = spans(receiver, "milestone")
    assert second.trace_id != first.trace_id and not first.links
    (link,) = second.links
    assert (link.trace_id, link.span_id) == (first.trace_id, first.span_id)
    assert program.run("run", ambiguous, "--fresh", *LOCAL).returncode == 3
    assert not spans(receiver, "milestone")[2].links     # over again, with no past


@pytest.mark.contract
def test_the_agent_is_told_which_span_its_own_are_to_be_children_of(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    seen = repository / "seen"
    claude = repository / "claude"
    claude.write_text(f'#!/bin/sh\nenv >{seen}\nexec {LOCAL[3]} "$@"\n')
    claude.chmod(0o755)
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    done = program.run("run", HELLO, "--sandbox", "local", "--claude", claude)
    assert done.returncode == 0, done.stderr
    (call,) = spans(receiver, "claude_invoke")
    told = dict(line.split("=", 1) for line in seen.read_text().splitlines())
    parent = f"00-{call.trace_id.hex()}-{call.span_id.hex()}-"
    assert told["TRACEPARENT"].startswith(parent)
    off = Program(repository)
    assert off.run("run", HELLO, "--fresh", "--sandbox", "local", "--claude",
                   claude).returncode == 0
    assert "TRACEPARENT" not in seen.read_text()


def manual_variables() -> dict[str, str]:
    """Those that the manual tells to set for the CLI's own spans."""
    manual = (ROOT / "docs/telemetry.md").read_text()
    block = manual.partition("CLAUDE_CODE_ENABLE_TELEMETRY=1")
    lines = f"{''.join(block[1:])}".partition("```")[0].replace("export ", "")
    return dict(pair.split("=", 1) for pair in lines.split())


@pytest.mark.contract
def test_the_real_clis_own_spans_stand_below_the_call_that_started_it(
    repository: Any, receiver: OtlpReceiver, real_claude: str,
) -> None:
    scenarios = json.loads((TEST_PLANS / "scenarios.json").read_text())
    with ScriptedApi(scenarios) as api:
        program = Program(
            repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, HOME=str(repository),
            **manual_variables(), ANTHROPIC_BASE_URL=api.url,
            ANTHROPIC_API_KEY="dummy-key", DISABLE_AUTOUPDATER="1",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1")
        done = program.run("run", HELLO, "--sandbox", "local", "--claude", real_claude)
    assert done.returncode == 0, done.stderr
    (call,) = spans(receiver, "claude_invoke")
    theirs = [s for s in receiver.spans if s.name.startswith("claude_code.")]
    (top,) = (s for s in theirs if s.name == "claude_code.interaction")
    assert top.parent_span_id == call.span_id
    assert {s.trace_id for s in theirs} == {call.trace_id} and len(theirs) > 2


@pytest.mark.parametrize("is_on", [False, True])
def test_the_agent_in_the_container_gets_telemetry_variables_if_the_cli_has_it_on(
    is_on: bool,
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "key=secret", "PATH": "/bin"} | (
        {"CLAUDE_CODE_ENABLE_TELEMETRY": "1"} if is_on else {})
    sandbox = ko.DockerSandbox(ko.Processes(ko.Clock()), ko.Config(), environ)
    argv = sandbox.command(["claude"], b"", TRACEPARENT="00-1-2-01").argv
    assert "--env=TRACEPARENT=00-1-2-01" in argv
    assert ("--env=OTEL_EXPORTER_OTLP_HEADERS" in argv) == is_on
    assert "secret" not in " ".join(argv) and "--env=PATH" not in argv


@pytest.mark.contract
def test_failures_and_loops_are_marked_in_the_trace(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    done = program.run("run", TEST_PLANS / "doomed_to_fail.md", *LOCAL)
    assert done.returncode == 1
    assert tree(receiver)[-1] == ("loop_detected", "task")
    failed = [*spans(receiver, "claude_invoke"), *spans(receiver, "task"),
              *spans(receiver, "milestone")]
    assert len(failed) == 5
    assert {span.status.code for span in failed} == {ERROR}
    (loop,) = spans(receiver, "loop_detected")
    assert attributes(loop)["loop"] == "attempts"
    told = str(receiver.spans)           # no prompts, no outputs
    assert "75 lines" not in told and "exactly 100 lines" not in told


@pytest.mark.contract
def test_a_parked_question_is_no_error_and_a_span_of_its_own(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    done = program.run("run", TEST_PLANS / "ambiguous_task.md", *LOCAL)
    assert done.returncode == 3
    assert tree(receiver)[-1] == ("escalation", "task")
    assert not any(span.status.code for span in receiver.spans)


@pytest.mark.contract
@pytest.mark.slow
def test_a_fix_has_a_span_of_its_own(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    fixable = TEST_PLANS / "e2e_will_fail_fixable.md"
    assert program.run("run", fixable, *LOCAL).returncode == 0
    assert ("e2e_fix", "e2e_test") in tree(receiver)
    assert ("claude_invoke", "e2e_fix") in tree(receiver)


@pytest.mark.contract
@pytest.mark.parametrize("odd", [
    {"OTEL_PROPAGATORS": "b3"}, {"OTEL_PROPAGATORS": "none"},
    {"OTEL_TRACES_EXPORTER": ""}])
def test_odd_variables_neither_break_a_run_nor_its_telemetry(
    repository: Any, receiver: OtlpReceiver, odd: dict[str, str],
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, **odd)
    done = program.run("run", HELLO, *LOCAL)
    assert done.returncode == 0 and "telemetry" not in done.stderr, done.stderr
    assert spans(receiver, "milestone") and receiver.pushes
    assert (repository / "state/hello_world/traceparent").exists()


@pytest.mark.contract
def test_a_secret_in_a_header_that_is_none_is_not_told(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
                      OTEL_EXPORTER_OTLP_HEADERS="Authorization Bearer sk-SECRET")
    done = program.run("run", HELLO, *LOCAL)
    assert done.returncode == 0 and "SECRET" not in done.stderr, done.stderr


@pytest.mark.contract
def test_a_run_that_is_not_sampled_is_a_run(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
                      OTEL_TRACES_SAMPLER="always_off")
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    assert not receiver.spans and receiver.pushes


@pytest.mark.contract
def test_a_question_is_a_span_with_its_answer_and_what_it_waited(
    repository: Any, receiver: OtlpReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    ambiguous = TEST_PLANS / "ambiguous_task.md"
    assert program.run("run", ambiguous, *LOCAL).returncode == 3
    time.sleep(0.3)
    assert program.run("resume", ambiguous, "--answer", "a", *LOCAL).returncode == 0
    (asked,), (answer,) = (spans(receiver, name) for name in ("escalation", "answer"))
    assert asked.trace_id != answer.trace_id     # of the next run
    told = attributes(answer)
    assert told["question"] == attributes(asked)["question"] \
        == "Where should quotes be kept?"
    assert told["answer"].startswith("In memory") and told["waited_s"] >= 0.3


@pytest.mark.contract
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_dead_endpoint_costs_a_second_at_most_and_one_warning(
    repository: Any, receiver: OtlpReceiver, silent_port: int, kind: str,
) -> None:
    """Against one that answers at once: either way the SDK is imported."""
    url = "http://127.0.0.1:9" if kind == "refused" else f"http://127.0.0.1:{silent_port}"

    def seconds(endpoint: str) -> tuple[float, str]:
        program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        begun = time.monotonic()
        done = program.run("run", HELLO, *LOCAL, "--fresh")
        assert done.returncode == 0, done.stderr
        return time.monotonic() - begun, done.stderr

    alive, _ = min(seconds(receiver.url) for _ in range(2))
    dead, told = min(seconds(url) for _ in range(2))
    assert told.count("warning: telemetry: ") == 1 and "Traceback" not in told
    noise_s = 1.5                        # of a busy machine; the SDK alone takes 12 s
    assert dead < alive + ko.TELEMETRY_CLOSE_S + noise_s


@pytest.mark.contract
def test_the_end_waits_a_second_and_nothing_else_waits(
    tmp_path: Path, silent_port: int,
) -> None:
    script = """if True:
        import os, pathlib, time, ktrdr_orchestrator as ko
        def seconds(act):
            begun = time.monotonic()
            act()
            print(time.monotonic() - begun)
        telemetry = ko.Telemetry(os.environ, lambda _: None, pathlib.Path("m"))
        def work():
            for _ in range(1000):
                with telemetry.span("task", task="1.1"):
                    pass
        seconds(work)
        seconds(telemetry.close)"""
    (tmp_path / "ledger.jsonl").write_text('{"at": "2030-01-01", "milestone": "m"}\n')
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        check=True, timeout=60, env=Program(tmp_path).environ | {
            "PYTHONPATH": str(ROOT), "OTEL_EXPORTER_OTLP_ENDPOINT":
            f"http://127.0.0.1:{silent_port}"})
    work_s, close_s = map(float, done.stdout.split())
    assert work_s < 1.0 and ko.TELEMETRY_CLOSE_S - 0.1 < close_s < 1.5


def test_the_program_is_the_file_that_is_tested() -> None:
    assert PROGRAM.samefile(ko.__file__)
