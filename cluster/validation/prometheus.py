"""Prometheus: its configuration and the alert rules."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, join
from cluster.validation.promql import check_expression, is_duration
from cluster.validation.schema import check_schema

DURATIONS: Final = ("scrape_interval", "scrape_timeout", "evaluation_interval")


def check_prometheus(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a configuration of Prometheus."""
    found = list(check_schema(file.name, file.document, "prometheus"))
    yield from found
    if found:
        return
    config = file.document
    yield from _check_durations(file.name, config["global"], "global")
    for index, name in enumerate(config.get("rule_files", [])):
        if not (file.path.parent / name).is_file():
            yield Finding(file.name, join("rule_files", index), "a file beside this one", name)
    jobs = Counter(job["job_name"] for job in config["scrape_configs"])
    for index, job in enumerate(config["scrape_configs"]):
        at = join("scrape_configs", index)
        yield from _check_durations(file.name, job, at)
        if jobs[job["job_name"]] > 1:
            yield Finding(file.name, join(at, "job_name"), "each name once", job["job_name"])
        for number, rule in enumerate(job.get("relabel_configs", [])):
            yield from _check_relabel(file.name, rule, join(at, "relabel_configs", number))


def _check_durations(file: str, value: Mapping[str, Any], at: str) -> Iterator[Finding]:
    for key in DURATIONS:
        if key in value and not is_duration(value[key]):
            yield Finding(file, join(at, key), "a duration such as 10s", repr(value[key]))


def _check_relabel(file: str, rule: Mapping[str, Any], at: str) -> Iterator[Finding]:
    try:
        re.compile(rule.get("regex", ""))
    except re.error as error:
        yield Finding(
            file, join(at, "regex"), "a regular expression", f"{rule['regex']!r}: {error}"
        )
    if rule.get("action") == "keep" and "regex" not in rule:
        yield Finding(file, at, "a regex to keep by", "none")


def check_rules(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a file of alert rules."""
    found = list(check_schema(file.name, file.document, "alerts"))
    yield from found
    if found:
        return
    rules = [
        (join("groups", i, "rules", j), rule)
        for i, group in enumerate(file.document["groups"])
        for j, rule in enumerate(group["rules"])
    ]
    names = Counter(rule["alert"] for _, rule in rules)
    for at, rule in rules:
        if names[rule["alert"]] > 1:
            yield Finding(file.name, join(at, "alert"), "each name once", rule["alert"])
        if "for" in rule and not is_duration(rule["for"]):
            yield Finding(file.name, join(at, "for"), "a duration such as 5m", repr(rule["for"]))
        summary = rule["annotations"]["summary"]
        yield from check_expression(
            file.name, rule["expr"], join(at, "expr"), summary, join(at, "annotations.summary")
        )
