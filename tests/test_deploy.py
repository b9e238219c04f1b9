"""deploy/: the stack is pinned and local, its dashboard and alerts are sound."""
from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
from itertools import combinations
from typing import Any

import pytest
from backends import CACHE, binary
from conftest import ROOT, missing

import ktrdr_orchestrator as ko

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/orchestrator.json").read_text())
PANELS = DASHBOARD["panels"]
COLUMNS = 24
# ids of @grafana/data's units that are used here
UNITS = {"currencyUSD", "percentunit", "s", "short"}


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def names_in(text: str) -> set[str]:
    found = re.findall(r"\borchestrator_(\w+)", text)
    return {re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", name) for name in found}


def test_the_dashboard_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(DEPLOY / "grafana/dashboard.py"))["DASHBOARD"]
    assert json.loads(json.dumps(written)) == DASHBOARD


def test_every_metric_is_on_the_dashboard_and_no_other() -> None:
    variables = json.dumps(DASHBOARD["templating"])
    assert names_in(" ".join(expressions())) == ko.METRICS.keys()
    assert names_in(variables) | names_in((DEPLOY / "alerts.yml").read_text()) \
        <= ko.METRICS.keys()


def test_the_manual_has_every_metric_with_its_labels() -> None:
    manual = (ROOT / "docs/telemetry.md").read_text()
    rows = re.findall(r"^\| `orchestrator_(\w+)` \|([^|]*)\| (.+?) \|", manual,
                      re.MULTILINE)
    assert {name: (label.strip(), told) for name, label, told in rows} == {
        name: (f"`{label}`: {', '.join(values)}" if label else "", told)
        for name, (told, label, values) in ko.METRICS.items()}


def test_labels_in_queries_have_values_that_exist() -> None:
    for text in (*expressions(), (DEPLOY / "alerts.yml").read_text()):
        for name, labels in re.findall(r"orchestrator_(\w+)\{([^}]*)\}", text):
            (name,) = names_in(f"orchestrator_{name}")
            _, label, values = ko.METRICS[name]
            for key, value in re.findall(r'(\w+)[!=]~?"([^"]*)"', labels):
                assert key == "milestone" or key == label, (name, key)
                assert key == "milestone" or set(value.split("|")) <= set(values)


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS and min(at.values()) >= 0
    for a, b in combinations((panel["gridPos"] for panel in PANELS), 2):
        assert (a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
                or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]), (a, b)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_tells_its_unit_its_meaning_and_asks_the_chosen_source(
    panel: dict[str, Any],
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"] in UNITS and panel["description"].endswith(".")
    assert defaults["thresholds"]["steps"][0]["value"] is None
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert 'milestone=~"$milestone"' in target["expr"]
        assert "increase(" not in target["expr"] and "rate(" not in target["expr"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(set(refs)) == len(refs)


def test_a_milestone_leads_to_its_traces() -> None:
    (table,) = (panel for panel in PANELS if panel["type"] == "table")
    (url,) = re.findall(r'"url": "([^"]+)"', json.dumps(table))
    assert "${__data.fields.Milestone}" in url and "%22jaeger%22" in url
    sources = (DEPLOY / "grafana/provisioning/datasources/telemetry.yml").read_text()
    assert re.findall(r"uid: (\w+)", sources) == ["prometheus", "jaeger"]


@pytest.mark.contract
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_valid_by_grafanas_own_schema(panel: dict[str, Any]) -> None:
    schemas = CACHE / "grafana-schema"
    if not schemas.exists():
        missing(f"no {schemas} (.ci/install makes it)")
    import jsonschema

    def check(name: str, value: Any) -> None:
        schema = json.loads((schemas / f"{name}.json").read_text())
        errors = jsonschema.Draft7Validator(schema).iter_errors(value)
        assert not [f"{name}: {error.message}" for error in errors]
    check("Panel", panel)
    check(f"{panel['type']}.Options", panel["options"])
    if custom := panel["fieldConfig"]["defaults"].get("custom"):
        check(f"{panel['type']}.FieldConfig", custom)


@pytest.mark.contract
def test_the_dashboard_is_valid_by_grafanas_own_schema() -> None:
    schemas = CACHE / "grafana-schema"
    if not schemas.exists():
        missing(f"no {schemas} (.ci/install makes it)")
    import jsonschema
    schema = json.loads((schemas / "Dashboard.json").read_text())
    assert not [error.message for error in
                jsonschema.Draft7Validator(schema).iter_errors(DASHBOARD)]


@pytest.mark.contract
@pytest.mark.parametrize("argv", [
    ("check", "config", "prometheus.yml"), ("check", "rules", "--lint=all",
                                            "--lint-fatal", "alerts.yml")])
def test_prometheus_own_tool_is_content(argv: tuple[str, ...]) -> None:
    done = subprocess.run([binary("promtool"), *argv], cwd=DEPLOY, check=False,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def compose(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if "GRAFANA" not in k} | environ
    return subprocess.run(
        ["docker", "compose", "-f", str(DEPLOY / "docker-compose.yml"), *args],
        capture_output=True, text=True, check=False, timeout=60, env=variables)


@pytest.mark.contract
def test_the_stack_listens_on_loopback_is_pinned_and_asks_for_a_password() -> None:
    if not shutil.which("docker") or compose("version").returncode:
        missing("docker compose is not installed")
    refused = compose("config")
    assert refused.returncode != 0 and "GRAFANA_ADMIN_PASSWORD" in refused.stderr
    shown = compose("config", "--format", "json", GRAFANA_ADMIN_PASSWORD="secret")
    assert shown.returncode == 0, shown.stderr
    services = json.loads(shown.stdout)["services"]
    assert services.keys() == {"prometheus", "jaeger", "grafana"}
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert service["ports"]
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert volume["read_only"] and os.path.exists(volume["source"])
    flags = services["prometheus"]["command"]
    assert "--web.enable-otlp-receiver" in flags
    assert "--storage.tsdb.retention.time=400d" in flags
