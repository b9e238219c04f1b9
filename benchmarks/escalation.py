"""How well prose tells whether a person is needed: `judge` on labelled messages.

    python benchmarks/escalation.py CORPUS.jsonl

A line of the corpus is an object with `text`, `label` (completed, needs_human,
failed), `repo`, `style`, `stratum`, `borderline`, and for needs_human the spans
`question` and `options`. Missed: part of the messages that need a person and did not
escalate. False: part of the escalations that need nobody.
"""
from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from table import ROOT, show

sys.path.insert(0, str(ROOT))
import ktrdr_orchestrator as ko

RULES = ("_CHOOSES", "_COURTESY", "_REQUEST", "_HALTED", "_STUCK", "_WORK_DONE")
FOLDS, ROUNDS = 5, 1000
Message = Mapping[str, Any]
Row = dict[str, object]


def judged(message: Message) -> ko.Verdict:
    return ko.judge(ko.AgentResult(
        ended=ko.Ended.EXIT, exit_code=0, has_result=True, text=message["text"],
        subtype="success", terminal_reason="completed", events=1))


def counts(messages: Sequence[Message], asked: Mapping[str, bool]) -> list[int]:
    """Missed, needing a person, false, escalated."""
    needs = [m["label"] == "needs_human" for m in messages]
    asks = [asked[m["id"]] for m in messages]
    pairs = list(zip(needs, asks, strict=True))
    return [pairs.count((True, False)), sum(needs), pairs.count((False, True)),
            sum(asks)]


def share(part: int, whole: int) -> str:
    return f"{part}/{whole} = {part / whole:.0%}" if whole else f"{part}/0"


def row(name: str, messages: Sequence[Message], asked: Mapping[str, bool]) -> Row:
    missed, needs, false, asks = counts(messages, asked)
    return {"messages": name, "all": len(messages), "missed": share(missed, needs),
            "false": share(false, asks)}


def by_kind(messages: Sequence[Message], asked: Mapping[str, bool]) -> list[Row]:
    clear = [m for m in messages if not m["borderline"]]
    failed = [m for m in messages if m["label"] == "failed"]
    groups = {"not borderline": clear, "with borderline": messages,
              "random stratum": [m for m in messages if m["stratum"] == "random"],
              "random, not borderline": [m for m in clear if m["stratum"] == "random"],
              "labelled failed": failed}
    groups |= {f"style {style}": [m for m in messages if m["style"] == style]
               for style in sorted({m["style"] for m in messages})}
    return [row(name, group, asked) for name, group in groups.items()]


def by_rule(messages: Sequence[Message], verdicts: Mapping[str, ko.Verdict],
            ) -> list[Row]:
    rows: list[Row] = []
    for rule in sorted({verdict.rule for verdict in verdicts.values()}):
        of = [m for m in messages if verdicts[m["id"]].rule == rule]
        labels = [m["label"] for m in of]
        rows.append({"rule": rule, "repositories": len({m["repo"] for m in of}),
                     **{x: labels.count(x)
                        for x in ("needs_human", "completed", "failed")},
                     "escalated": sum(bool(verdicts[m["id"]].question) for m in of)})
    return rows


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def extraction(messages: Sequence[Message], verdicts: Mapping[str, ko.Verdict],
               ) -> list[Row]:
    """Of the escalations that a person labelled: the quoted question shares at least
    half of the words of the shorter of both; an option likewise."""
    def same(a: str, b: str) -> bool:
        one, two = words(a), words(b)
        return len(one & two) * 2 >= max(1, min(len(one), len(two)))
    found = [(m, q) for m in messages
             if m["label"] == "needs_human" and (q := verdicts[m["id"]].question)]
    options = [(o, q) for m, q in found for o in m["options"] or ()]
    hits = {
        "question": [same(m["question"], q.text) for m, q in found],
        "options": [any(same(o, ours) for ours in q.options) for o, q in options],
        "no option where none is labelled": [
            not q.options for m, q in found if not m["options"]]}
    return [{"extracted": name, "found": share(sum(of), len(of))}
            for name, of in hits.items()]


def by_chance(messages: Sequence[Message], asked: Mapping[str, bool]) -> list[Row]:
    """95 % of resamples of the repositories, each taken with all of its messages."""
    dice = random.Random(1)
    groups: dict[str, list[Message]] = {}
    for m in messages:
        groups.setdefault(m["repo"], []).append(m)
    each = [counts(group, asked) for group in groups.values()]
    draws = (dice.choices(each, k=len(each)) for _ in range(ROUNDS))
    drawn = [[sum(part) for part in zip(*draw, strict=True)] for draw in draws]

    def middle(part: int, whole: int) -> str:
        shares = sorted(d[part] / d[whole] for d in drawn if d[whole])
        cut = len(shares) // 40
        return f"{shares[cut]:.0%} to {shares[-1 - cut]:.0%}"
    return [{"repositories": len(groups), "missed": middle(0, 1),
             "false": middle(2, 3)}]


def alternatives(body: str) -> list[str]:
    """The outermost alternatives of a pattern."""
    depth, begins, in_class, i = 0, [0], False, 0
    while i < len(body):
        if body[i] == "\\":
            i += 1
        elif in_class or body[i] == "[":
            in_class = body[i] != "]"
        else:
            depth += (body[i] == "(") - (body[i] == ")")
            if body[i] == "|" and not depth:
                begins.append(i + 1)
        i += 1
    ends = [*(begin - 1 for begin in begins[1:]), len(body)]
    return [body[a:b] for a, b in zip(begins, ends, strict=True)]


def judged_with(parts: Mapping[str, Sequence[str]], messages: Sequence[Message],
                ) -> dict[str, bool]:
    """What asks, if each rule consists of these alternatives."""
    for name, left in parts.items():
        flags = "(?im)" if name == "_WORK_DONE" else "(?i)"
        setattr(ko, name, re.compile(flags + ("|".join(left) or "(?!)")))
    return {m["id"]: judged(m).question is not None for m in messages}


def errors(messages: Sequence[Message], asked: Mapping[str, bool]) -> int:
    missed, _, false, _ = counts(messages, asked)
    return missed + false


def held_out(messages: Sequence[Message]) -> Iterator[Row]:
    """Cross-validation: a fold of repositories is judged by what is left of the rules
    when, one after the other, the alternatives go that the other repositories do not
    need (or, milder, that do harm there): rules that fit one repository only fall."""
    full = {name: alternatives(re.sub(r"^\(\?\w+\)", "", getattr(ko, name).pattern))
            for name in RULES}
    repos = sorted({m["repo"] for m in messages})
    for kept_if, margin in (
            ("they pay elsewhere", 0), ("they do no harm elsewhere", 1)):
        total, dropped = [0, 0, 0, 0], 0
        for fold in range(FOLDS):
            test = [m for m in messages if repos.index(m["repo"]) % FOLDS == fold]
            train = [m for m in messages if m not in test]
            rules, least = full, errors(train, judged_with(full, train))
            for name, part in ((n, p) for n in RULES for p in full[n]):
                less = {**rules, name: [p for p in rules[name] if p != part]}
                now = errors(train, judged_with(less, train))
                if now + margin <= least:
                    rules, least, dropped = less, now, dropped + 1
            told = judged_with(rules, test)
            total = [a + b for a, b in zip(total, counts(test, told), strict=True)]
        judged_with(full, [])
        yield {"alternatives stay if": kept_if, "all": sum(map(len, full.values())),
               "dropped per fold": dropped / FOLDS, "missed": share(*total[:2]),
               "false": share(*total[2:])}


def main(corpus: Path) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines()
    messages: list[Message] = [json.loads(line) for line in lines]
    verdicts = {m["id"]: judged(m) for m in messages}
    asked = {key: verdict.question is not None for key, verdict in verdicts.items()}
    clear = [m for m in messages if not m["borderline"]]
    show("Escalation of prose", by_kind(messages, asked))
    show("By rule", by_rule(messages, verdicts))
    show("Extraction", extraction(messages, verdicts))
    show("Not borderline, other repositories by chance (95 %)", by_chance(clear, asked))
    show("Not borderline, on repositories held out", list(held_out(clear)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/escalation.py CORPUS.jsonl")
    main(Path(sys.argv[1]))
