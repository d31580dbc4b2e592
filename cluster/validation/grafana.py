"""Grafana: dashboards, and the files that provision them."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cluster.validation.deploy_file import DeployFile
from cluster.validation.finding import Finding, among, join
from cluster.validation.promql import check_expression, known_metrics
from cluster.validation.schema import check_schema

WIDTH: Final = 24  # columns of Grafana's grid
VALUES_OF: Final = re.compile(r"label_values\((\w+), *(\w+)\)")


def check_dashboard(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in a dashboard."""
    found = list(check_schema(file.name, file.document, "dashboard"))
    yield from found
    if found:
        return
    panels = file.document["panels"]
    ids = Counter(panel["id"] for panel in panels)
    for index, panel in enumerate(panels):
        at = join("panels", index)
        if ids[panel["id"]] > 1:
            yield Finding(file.name, join(at, "id"), "each id once", str(panel["id"]))
        if panel["gridPos"]["x"] + panel["gridPos"]["w"] > WIDTH:
            yield Finding(file.name, join(at, "gridPos"), f"x + w up to {WIDTH}", panel["title"])
        yield from _check_targets(file.name, panel, at)
    yield from _check_overlaps(file.name, panels)
    for index, variable in enumerate(file.document["templating"]["list"]):
        yield from _check_variable(file.name, variable, join("templating.list", index))


def _check_targets(file: str, panel: Mapping[str, Any], at: str) -> Iterator[Finding]:
    for index, target in enumerate(panel.get("targets", [])):
        here = join(at, "targets", index)
        yield from check_expression(
            file,
            target["expr"],
            join(here, "expr"),
            target["legendFormat"],
            join(here, "legendFormat"),
        )


def _check_overlaps(file: str, panels: list[Mapping[str, Any]]) -> Iterator[Finding]:
    taken: dict[tuple[int, int], str] = {}
    for index, panel in enumerate(panels):
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        hit = sorted({taken[cell] for cell in cells if cell in taken})
        if hit:
            yield Finding(
                file, join("panels", index, "gridPos"), "a free place", f"that of {hit[0]!r}"
            )
        taken |= dict.fromkeys(cells, panel["title"])


def _check_variable(file: str, variable: Mapping[str, Any], at: str) -> Iterator[Finding]:
    match = VALUES_OF.fullmatch(variable["query"])
    known = known_metrics()
    if match is None:
        yield Finding(file, join(at, "query"), "label_values(METRIC, LABEL)", variable["query"])
    elif match[1] not in known:
        yield Finding(file, join(at, "query"), among(match[1], known), f"metric {match[1]!r}")
    elif match[2] not in known[match[1]]:
        yield Finding(
            file, join(at, "query"), among(match[2], known[match[1]]), f"label {match[2]!r}"
        )


def check_datasources(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in the provisioned data sources."""
    yield from check_schema(file.name, file.document, "datasources")


def check_providers(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in the provisioned folders of dashboards."""
    yield from check_schema(file.name, file.document, "providers")
