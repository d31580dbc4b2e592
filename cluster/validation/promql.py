"""Expressions of Prometheus: their syntax, and every metric and label in them by name.

Known metrics are ours, as ``cluster.metrics`` lists them and Ray exports them (prefix ``ray_``,
histograms as three series), and the few of Ray and Prometheus that are listed here.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from cluster.metrics import METRICS, Kind
from cluster.validation.finding import Finding, among

PREFIX: Final = "ray_"
COMMON_LABELS: Final = frozenset({"instance", "job", "pod"})  # of Prometheus itself
RAY_LABELS: Final = frozenset({"Component", "NodeAddress", "SessionName", "Version", "WorkerId"})
NODE_LABELS: Final = frozenset({"IsHeadNode", "RayNodeType", "SessionName", "Version", "ip"})
SERVE_LABELS: Final = RAY_LABELS | {"application", "deployment", "replica"}
OTHERS: Final[Mapping[str, frozenset[str]]] = {
    "up": frozenset(),
    "ray_node_cpu_utilization": NODE_LABELS,
    "ray_node_gpus_utilization": NODE_LABELS | {"GpuIndex", "GpuDeviceName"},
    "ray_serve_autoscaling_desired_replicas": SERVE_LABELS,
    "ray_serve_deployment_replica_healthy": SERVE_LABELS,
    "ray_serve_record_autoscaling_stats_failed_total": SERVE_LABELS | {"exception_name"},
    "ray_serve_replica_processing_queries": SERVE_LABELS,
}
INTERVAL: Final = re.compile(r"\$__(rate_interval|interval|range)")
LABEL_IN_TEMPLATE: Final = re.compile(r"\$labels\.(\w+)|\{\{\s*(\w+)\s*\}\}")


@cache
def known_metrics() -> Mapping[str, frozenset[str]]:
    """Return every known series and its labels."""
    known = dict(OTHERS)
    for metric in METRICS.values():
        labels = SERVE_LABELS | set(metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            known[f"{PREFIX}{metric.name}_bucket"] = labels | {"le"}
            known[f"{PREFIX}{metric.name}_sum"] = labels
            known[f"{PREFIX}{metric.name}_count"] = labels
        else:
            known[f"{PREFIX}{metric.name}"] = labels
    return known


def check_expression(
    file: str, text: str, at: str, template: str = "", template_at: str = ""
) -> Iterator[Finding]:
    """Yield what is wrong in an expression, and labels in a text about its result.

    Args:
        file: Name of the file.
        text: The expression, with Grafana's intervals if it likes.
        at: Path of the expression in the file.
        template: Text that names labels of the result, as ``{{name}}`` or ``$labels.name``.
        template_at: Path of that text.
    """
    import promql_parser  # noqa: PLC0415 - only where expressions are checked

    try:
        tree = promql_parser.parse(INTERVAL.sub("5m", text))
    except ValueError as error:
        yield Finding(file, at, "an expression of PromQL", f"{error} in {text!r}")
        return
    nodes: list[Any] = []
    promql_parser.walk(tree, nodes.append)
    selectors = [each for each in nodes if isinstance(each, promql_parser.VectorSelector)]
    known = known_metrics()
    unknown = [str(each.name) for each in selectors if each.name not in known]
    if unknown:
        yield Finding(file, at, among(unknown[0], known), f"metric {unknown[0]!r}")
        return
    for label, allowed in _labels(nodes, selectors):
        if label not in allowed:
            yield Finding(file, at, among(label, allowed), f"label {label!r}")
    kept = COMMON_LABELS.union(_grouped(nodes))
    for match in LABEL_IN_TEMPLATE.finditer(template):
        name = match[1] or match[2]
        if name not in kept:
            yield Finding(file, template_at, f"label {among(name, kept)} of the result", repr(name))


def _labels(nodes: list[Any], selectors: list[Any]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the labels in an expression, each with those it could be."""
    of = {each.name: known_metrics()[each.name] | COMMON_LABELS for each in selectors}
    for selector in selectors:
        for matcher in selector.matchers.matchers:
            yield matcher.name, of[selector.name]
    for name in _grouped(nodes):
        yield name, COMMON_LABELS.union(*of.values())


def _grouped(nodes: list[Any]) -> Iterator[str]:
    """Yield the labels that aggregations keep."""
    for node in nodes:
        modifier = getattr(node, "modifier", None)
        yield from getattr(modifier, "labels", None) or ()


def is_duration(text: object) -> bool:
    """Whether Prometheus reads this as a duration."""
    import promql_parser  # noqa: PLC0415 - as above

    try:
        return isinstance(text, str) and promql_parser.parse_duration(text).total_seconds() >= 0
    except ValueError:
        return False
