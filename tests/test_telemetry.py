"""Section 13: spans reach a backend, and a silent backend changes nothing."""
from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT, TEST_PLANS
from program import LOCAL, PROGRAM, Program
from receiver import SpanReceiver

import ktrdr_orchestrator as ko

HELLO = TEST_PLANS / "hello_world.md"


@pytest.fixture
def receiver() -> Iterator[SpanReceiver]:
    with SpanReceiver() as server:
        yield server


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield listening.getsockname()[1]


def test_without_an_endpoint_it_is_off_and_imports_nothing() -> None:
    told: list[str] = []
    telemetry = ko.Telemetry({}, told.append)
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


@pytest.mark.contract
def test_the_spans_of_a_run_are_one_trace_in_their_hierarchy(
    repository: Any, receiver: SpanReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    assert program.run("run", HELLO, *LOCAL).returncode == 0
    by_name = {span.name: span for span in receiver.spans}
    names = ["orchestrator.milestone", "orchestrator.task",
             "orchestrator.claude_invoke"]
    assert sorted(by_name) == sorted(names)
    parents = [by_name[name].parent_span_id for name in names]
    assert parents == [b"", by_name[names[0]].span_id, by_name[names[1]].span_id]
    assert len({span.trace_id for span in receiver.spans}) == 1
    task = {a.key: a.value.string_value for a in by_name[names[1]].attributes}
    assert task["orchestrator.task"] == "1.1"
    assert task["orchestrator.status"] == "completed"
    call = {a.key: a.value for a in by_name[names[2]].attributes}
    assert call["gen_ai.usage.output_tokens"].int_value > 0
    assert call["orchestrator.cost_usd"].double_value > 0


@pytest.mark.contract
def test_a_question_is_a_span_with_its_answer_and_what_it_waited(
    repository: Any, receiver: SpanReceiver,
) -> None:
    program = Program(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    ambiguous = TEST_PLANS / "ambiguous_task.md"
    assert program.run("run", ambiguous, *LOCAL).returncode == 3
    time.sleep(0.3)
    assert program.run("resume", ambiguous, "--answer", "a", *LOCAL).returncode == 0
    asked, = (span for span in receiver.spans if span.name == "orchestrator.escalation")
    told = {a.key: a.value for a in asked.attributes}
    assert told["orchestrator.question"].string_value == "Where should quotes be kept?"
    assert told["orchestrator.answer"].string_value.startswith("In memory")
    assert told["orchestrator.waited_s"].double_value >= 0.3


@pytest.mark.contract
@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_dead_endpoint_costs_a_second_at_most_and_one_warning(
    repository: Any, silent_port: int, kind: str,
) -> None:
    url = "http://127.0.0.1:9" if kind == "refused" else f"http://127.0.0.1:{silent_port}"

    def seconds(**environ: str) -> tuple[float, str]:
        program = Program(repository, **environ)
        begun = time.monotonic()
        done = program.run("run", HELLO, *LOCAL, "--fresh")
        assert done.returncode == 0, done.stderr
        return time.monotonic() - begun, done.stderr

    plain, _ = seconds()
    dead, told = seconds(OTEL_EXPORTER_OTLP_ENDPOINT=url)
    assert told.count("telemetry was not sent") == 1 and "Traceback" not in told
    imports_s = 1.0                      # of the SDK, on a busy machine
    assert dead < plain + ko.TELEMETRY_CLOSE_S + imports_s


def test_the_program_is_the_file_that_is_tested() -> None:
    assert PROGRAM.samefile(ko.__file__)
