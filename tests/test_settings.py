"""Section 2: flag > environment > file > default; an error names its source."""
from __future__ import annotations

import pytest

import ktrdr_orchestrator as ko

KEYS = {setting.name: key for key, setting in ko.SETTINGS.items()}


def resolved(flags: dict[str, str] | None = None, environ: dict[str, str] | None = None,
             file: dict[str, str] | None = None) -> tuple[ko.Config, dict[str, str]]:
    by_key = {KEYS[name]: text for name, text in (flags or {}).items()}
    return ko.resolve_config(by_key, environ or {}, file or {}, "orchestrator.ini")


def test_without_anything_written_the_defaults_hold() -> None:
    config, sources = resolved()
    assert config == ko.Config()
    assert set(sources.values()) == {"default"} and len(sources) == len(ko.SETTINGS)


@pytest.mark.parametrize(("written", "value"), [
    (("1", "2", "3"), 1), ((None, "2", "3"), 2), ((None, None, "3"), 3)])
def test_a_flag_outranks_the_environment_that_the_file(
    written: tuple[str | None, ...], value: int,
) -> None:
    flag, variable, key = written
    config, sources = resolved(
        {"max_turns": flag} if flag else {},
        {"ORCHESTRATOR_MAX_TURNS": variable} if variable else {},
        {"max_turns": key} if key else {})
    assert config.max_turns == value
    assert ("--max-turns", "environment", "orchestrator.ini")[value - 1] in \
        sources["max_turns"]


@pytest.mark.parametrize(("name", "text", "value"), [
    ("state_dir", "/x", "/x"), ("task_timeout_s", "90", 90.0),
    ("max_cost_usd", "2.5", 2.5), ("outage_delays_s", "1,2 3/4", (1, 2, 3, 4)),
    ("sandbox", "local", "local")])
def test_a_value_has_the_type_of_its_default(
    name: str, text: str, value: object,
) -> None:
    assert getattr(resolved({name: text})[0], name) == value


@pytest.mark.parametrize(("name", "text"), [
    ("max_turns", "many"), ("max_turns", "0"), ("max_turns", "1.5"), ("max_turns", ""),
    ("task_timeout_s", "-1"), ("task_timeout_s", "nan"), ("sandbox", "cloud"),
    ("outage_delays_s", "soon"), ("max_cost_usd", "-1"), ("error_similarity", "1.5"),
    ("claude", "'claude")])
def test_a_bad_value_is_an_error_with_it_and_its_source(name: str, text: str) -> None:
    key = KEYS[name]
    variable = f"ORCHESTRATOR_{key.upper()}"
    for source, written in (("--", ({name: text}, {}, {})),
                            ("environment", ({}, {variable: text}, {})),
                            ("orchestrator.ini", ({}, {}, {key: text}))):
        with pytest.raises(ko.OrchestratorError) as caught:
            resolved(*written)
        assert repr(text) in str(caught.value) and source in str(caught.value)
        assert caught.value.exit_code == ko.ExitCode.USAGE and caught.value.hint


def test_an_unknown_variable_or_key_is_an_error_and_the_rest_of_the_environment_is_not(
) -> None:
    resolved({}, {"PATH": "/bin", "HOME": "/"})
    with pytest.raises(ko.OrchestratorError, match="ORCHESTRATOR_TYPO"):
        resolved({}, {"ORCHESTRATOR_TYPO": "1"})
    with pytest.raises(ko.OrchestratorError, match="typo"):
        resolved({}, {}, {"typo": "1"})
