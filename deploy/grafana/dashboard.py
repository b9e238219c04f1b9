#!/usr/bin/env python3
"""Write dashboards/orchestrator.json, the dashboard of ktrdr-orchestrator.

    python deploy/grafana/dashboard.py >deploy/grafana/dashboards/orchestrator.json

Every growth is `max_over_time - min_over_time` of the totals: exact, where `increase`
extrapolates (docs/telemetry.md). `noValue` stands where nothing ran; nothing is made
100 % or 0 by `or vector()`.
"""
from __future__ import annotations

import json
import urllib.parse
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS = 'milestone=~"$milestone"'
DAY = "[1d] offset -1d"          # a bar stands at the start of its day
RANGE = "[$__range]"
EXACT = " Exact: last minus first total of the window."
TRACES = "/explore?schemaVersion=1&panes=" + urllib.parse.quote(json.dumps({"t": {
    "datasource": "jaeger", "queries": [{
        "refId": "A", "queryType": "search", "service": "ktrdr-orchestrator",
        "operation": "orchestrator.milestone",
        "tags": "orchestrator.milestone=MILESTONE"}],
    "range": {"from": "now-7d", "to": "now"}}})).replace(
        "MILESTONE", "${__data.fields.Milestone}")


def growth(metric: str, labels: str = "", window: str = RANGE) -> str:
    labels = ",".join(filter(None, (labels, OURS)))
    series = f"orchestrator_{metric}{{{labels}}}{window}"
    return f"(max_over_time({series}) - min_over_time({series}))"


def latest(metric: str, labels: str = "", by: str = "milestone") -> str:
    labels = ",".join(filter(None, (labels, OURS)))
    return f"sum by ({by}) (last_over_time(orchestrator_{metric}{{{labels}}}{RANGE}))"


def ratio(part: str, whole: str) -> str:
    """Of nothing it is nothing."""
    return f"sum({part}) / (sum({whole}) > 0)"


def quantile(q: float, window: str = RANGE) -> str:
    buckets = growth("task_duration_seconds_bucket", window=window)
    return f"histogram_quantile({q}, sum by (le) ({buckets}))"


def per_day(by: str, metric: str, labels: str = "") -> str:
    return f"sum by ({by}) ({growth(metric, labels, DAY)})"


def steps(*colors: tuple[str, float | None]) -> dict[str, Any]:
    return {"mode": "absolute",
            "steps": [{"color": color, "value": value} for color, value in colors]}


def panel(kind: str, title: str, told: str, at: tuple[int, int, int, int], unit: str,
          queries: dict[str, str], **more: Any) -> dict[str, Any]:
    """`queries`: expression by legend. What ends in s is shown as its last value."""
    x, y, w, h = at
    is_series = kind == "timeseries"
    targets = [{"refId": chr(65 + n), "datasource": SOURCE, "editorMode": "code",
                "expr": expr, "legendFormat": legend, "instant": not is_series,
                "range": is_series, **({"format": "table"} if kind == "table" else {})}
               for n, (legend, expr) in enumerate(queries.items())]
    defaults = {"unit": unit, "min": 0, "mappings": [], "thresholds": steps(
        ("green", None)), "color": {"mode": "palette-classic" if is_series else
                                    "thresholds"}, **more.pop("defaults", {})}
    return {"type": kind, "title": title, "description": told, "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": w, "h": h}, "targets": targets,
            "fieldConfig": {"defaults": defaults,
                            "overrides": more.pop("overrides", [])}, **more}


def stat(title: str, told: str, x: int, unit: str, queries: dict[str, str], *,
         none: str, thresholds: dict[str, Any] | None = None, y: int = 0,
         ) -> dict[str, Any]:
    return panel("stat", title, told, (x, y, 6, 4), unit, queries, defaults={
        "noValue": none, "thresholds": thresholds or steps(("green", None))}, options={
        "colorMode": "value", "graphMode": "none", "justifyMode": "auto",
        "orientation": "auto", "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False, "textMode": "auto", "wideLayout": True})


def bars(title: str, told: str, x: int, y: int, unit: str, queries: dict[str, str],
         ) -> dict[str, Any]:
    return panel("timeseries", title, told, (x, y, 12, 8), unit, queries, interval="1d",
                 defaults={"noValue": "nothing ran", "custom": {
                     "drawStyle": "bars", "fillOpacity": 80, "lineWidth": 0,
                     "showPoints": "never", "stacking": {"mode": "normal",
                                                         "group": "A"}}},
                 options={"legend": {"calcs": ["sum"], "displayMode": "table",
                                     "placement": "bottom", "showLegend": True},
                          "tooltip": {"mode": "multi", "sort": "desc"}})


GOOD = steps(("red", None), ("yellow", 0.8), ("green", 0.9))
FEW = steps(("green", None), ("yellow", 0.2), ("red", 0.4))
ATTEMPTS = growth("tasks_total", 'status=~"completed|failed"')
RUNS = growth("e2e_tests_total")
NOT_PASSED = growth("e2e_tests_total", 'status!="completed"')
FIXED = growth("e2e_fix_attempts_total", 'success="true"')
STATS = [
    stat("Cost", "US dollars spent in the selected time." + EXACT, 0, "currencyUSD",
         {"cost": f"sum({growth('cost_usd_total')})"}, none="$0"),
    stat("Task success rate", "Attempts that completed a task, of those that completed "
         "or failed; gates have the last word." + EXACT, 6, "percentunit",
         {"success": ratio(growth("tasks_total", 'status="completed"'), ATTEMPTS)},
         none="no attempts", thresholds=GOOD),
    stat("Escalations", "Questions to a person per attempt at a task in this time; of "
         "all answers since the ledger began, the share that followed the agent's "
         "advice: it might have gone on.", 12, "percentunit", {
             "per attempt": ratio(growth("escalations_total"), growth("tasks_total")),
             "as advised": ratio(latest("answers_total", 'advice="followed"'),
                                 latest("answers_total"))},
         none="none", thresholds=FEW),
    stat("Waiting for a person", "Questions that nobody has answered yet.", 18,
         "short", {"waiting": "sum(last_over_time(orchestrator_waiting"
                              f'{{cause="person",{OURS}}}{RANGE}))'},
         none="none", thresholds=steps(("green", None), ("red", 1))),
    stat("E2E pass rate", "Scenario runs that passed, of all." + EXACT, 0,
         "percentunit",
         {"passed": ratio(growth("e2e_tests_total", 'status="completed"'), RUNS)},
         none="no E2E runs", thresholds=GOOD, y=4),
    stat("E2E flakiness", "Scenario runs that failed or were unclear and that no fix "
         "explains, of all." + EXACT, 6, "percentunit", {"unexplained":
         f"clamp_min(sum({NOT_PASSED}) - sum({FIXED}), 0) / (sum({RUNS}) > 0)"},
         none="no E2E runs", thresholds=FEW, y=4),
    stat("Loops detected", "Tasks given up, by what went round in circles." + EXACT, 12,
         "short", {"{{type}}": f"sum by (type) ({growth('loops_detected_total')})"},
         none="none", thresholds=steps(("green", None), ("red", 1)), y=4),
    stat("Attempt duration", "Half and 95 % of the attempts took less; from a "
         "histogram's buckets.", 18, "s", {"P50": quantile(0.5), "P95": quantile(0.95)},
         none="no attempts", thresholds=steps(("green", None), ("yellow", 1800),
                                              ("red", 3600)), y=4)]
DAILY = [
    bars("Cost per day", "By milestone and UTC day." + EXACT, 0, 8, "currencyUSD",
         {"{{milestone}}": per_day("milestone", "cost_usd_total")}),
    bars("Attempts per day", "At tasks, by verdict." + EXACT, 12, 8, "short",
         {"{{status}}": per_day("status", "tasks_total")}),
    bars("Tokens per day", "Of all agent calls, by kind." + EXACT, 0, 16, "short",
         {"{{kind}}": per_day("kind", "tokens_total")}),
    bars("Trouble per day", "Questions, loops and fixes." + EXACT, 12, 16, "short", {
        "questions": f"sum({growth('escalations_total', window=DAY)})",
        "loops": f"sum({growth('loops_detected_total', window=DAY)})",
        "fix, success {{success}}": per_day("success", "e2e_fix_attempts_total")}),
    bars("E2E runs per day", "Of the scenario, by what they showed." + EXACT, 0, 24,
         "short", {"{{status}}": per_day("status", "e2e_tests_total")}),
    bars("Outage waiting per day", "Slept until the API may be back." + EXACT, 12, 24,
         "s", {"{{milestone}}": per_day("milestone", "outage_wait_seconds_sum")})]
LINES = [
    panel("timeseries", title, told, (x, 32, 12, 8), "s", queries, interval="1d",
          defaults={"noValue": "nothing ran", "custom": {
              "drawStyle": "line", "lineWidth": 2, "fillOpacity": 0,
              "showPoints": "always", "spanNulls": True}},
          options={"legend": {"calcs": ["lastNotNull"], "displayMode": "list",
                              "placement": "bottom", "showLegend": True},
                   "tooltip": {"mode": "multi", "sort": "desc"}})
    for x, title, told, queries in (
        (0, "Attempt duration by day", "P50 and P95, from a histogram's buckets.",
         {"P50": quantile(0.5, DAY), "P95": quantile(0.95, DAY)}),
        (12, "Reset time by day", "From a start of the program to a sandbox that is "
         "clean and on the milestone's branch, on average." + EXACT,
         {"{{milestone}}": per_day("milestone", "sandbox_reset_seconds_sum") + " / ("
          + per_day("milestone", "sandbox_reset_seconds_count") + " > 0)"}))]
COLUMNS = {
    "Completed": latest("tasks_total", 'status="completed"'),
    "Failed": latest("tasks_total", 'status="failed"'),
    "Cost": latest("cost_usd_total"), "Tokens": latest("tokens_total"),
    "Questions": latest("escalations_total"),
    "Running": latest("running"),
    "Waits for answers": latest("waiting", 'cause="person"'),
    "Waits for the API": latest("waiting", 'cause="api"')}
NO_ZERO = [{"type": "value", "options": {"0": {"text": "", "index": 0}}}]
TABLE = panel(
    "table", "Milestones", "Totals since each began. The name leads to its traces.",
    (0, 40, 24, 9), "short", COLUMNS,
    defaults={"custom": {"align": "auto", "cellOptions": {"type": "auto"},
                         "filterable": False, "inspect": False}},
    overrides=[
        {"matcher": {"id": "byName", "options": "Cost"},
         "properties": [{"id": "unit", "value": "currencyUSD"}]},
        {"matcher": {"id": "byName", "options": "Milestone"}, "properties": [
            {"id": "links", "value": [{"title": "Traces", "url": TRACES}]}]},
        *({"matcher": {"id": "byName", "options": name},
           "properties": [{"id": "mappings", "value": NO_ZERO}]}
          for name in ("Running", "Waits for answers", "Waits for the API"))],
    options={"cellHeight": "sm", "frameIndex": 0, "showHeader": True,
             "sortBy": [{"desc": True, "displayName": "Waits for answers"}]},
    transformations=[
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": {"Time": True},
            "renameByName": {"milestone": "Milestone", **{
                f"Value #{chr(65 + n)}": name for n, name in enumerate(COLUMNS)}}}}])
DASHBOARD = {
    "uid": "ktrdr-orchestrator", "title": "ktrdr-orchestrator",
    "description": "What the milestones cost, how they went, what they wait for.",
    "tags": ["orchestrator"], "schemaVersion": 41, "version": 1, "editable": False,
    "graphTooltip": 1, "timezone": "utc", "refresh": "1m", "links": [],
    "time": {"from": "now-7d", "to": "now"}, "fiscalYearStartMonth": 0,
    "annotations": {"list": []},
    "templating": {"list": [
        {"name": "datasource", "label": "Data source", "type": "datasource",
         "query": "prometheus", "hide": 0,
         "current": {"text": "Prometheus", "value": "prometheus"},
         "includeAll": False, "multi": False, "options": [], "refresh": 1,
         "regex": "", "skipUrlSync": False},
        {"name": "milestone", "label": "Milestone", "type": "query",
         "datasource": SOURCE, "query": {
             "qryType": 1, "refId": "milestones",
             "query": "label_values(orchestrator_cost_usd_total,milestone)"},
         "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
         "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2, "sort": 1,
         "hide": 0, "regex": "", "options": [], "skipUrlSync": False}]},
    "panels": [{"id": n, **each} for n, each in enumerate(
        [*STATS, *DAILY, *LINES, TABLE], start=1)]}

if __name__ == "__main__":
    print(json.dumps(DASHBOARD, indent=2))
