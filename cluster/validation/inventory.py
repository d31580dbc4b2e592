"""Every file of a deploy folder, and the check that each belongs to.

A file that no check knows is a finding, and so is one that is missing: nothing is deployed that
nobody has looked at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cluster.errors import ConfigurationError
from cluster.validation.agreement import check_agreement
from cluster.validation.compose import check_compose
from cluster.validation.containerfile import check_containerfile
from cluster.validation.deploy_file import DeployFile, read
from cluster.validation.finding import Finding
from cluster.validation.grafana import check_dashboard, check_datasources, check_providers
from cluster.validation.kubernetes import check_objects
from cluster.validation.launcher import check_launcher
from cluster.validation.prometheus import check_prometheus, check_rules
from cluster.validation.reach import check_reach
from cluster.validation.secrecy import check_secrets
from cluster.validation.serve import check_serve

Check = Callable[[DeployFile], Iterator[Finding]]

CHECKS: Final[Mapping[str, Check]] = {
    "serve_config.yaml": check_serve,
    "serve_config.*.yaml": check_serve,
    "ray_cluster.yaml": check_launcher,
    "compose.yaml": check_compose,
    "Containerfile": check_containerfile,
    "kuberay/*.yaml": check_objects,
    "prometheus/alerts.yaml": check_rules,
    "prometheus/*.yaml": check_prometheus,
    "grafana/dashboards/*.json": check_dashboard,
    "grafana/provisioning/datasources.yaml": check_datasources,
    "grafana/provisioning/dashboards.yaml": check_providers,
}
NEEDED: Final = (*(name for name in CHECKS if "*" not in name), "kuberay/rayservice.yaml")


def shipped() -> Path:
    """Return the deploy folder that comes with the package."""
    return Path(__file__).parents[1] / "deploy"


def validate(folder: Path) -> tuple[int, Sequence[Finding]]:
    """Return how many files there are, and all findings in order.

    Args:
        folder: A deploy folder.

    Raises:
        ConfigurationError: No such folder, or a file that is not text.
    """
    if not folder.is_dir():
        message = f"{folder}: expected a deploy folder, got none; pass --dir"
        raise ConfigurationError(message)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    findings = [Finding(name, "", "the file", "none") for name in NEEDED if name not in names]
    sound: dict[str, DeployFile] = {}
    for name, path in names.items():
        file = read(path, name)
        found = [file] if isinstance(file, Finding) else list(check(file))
        findings += found
        if isinstance(file, DeployFile) and not found:
            sound[name] = file
    findings += check_together(sound)
    return len(names), sorted(set(findings))


def check_together(sound: Mapping[str, DeployFile]) -> Iterator[Finding]:
    """Yield what files, each right by itself, do not agree on."""
    yield from check_agreement(sound, version("ray"))
    yield from check_reach(sound)


def check(file: DeployFile) -> Iterator[Finding]:
    """Yield what is wrong in one file by itself."""
    checks = [each for pattern, each in CHECKS.items() if fnmatchcase(file.name, pattern)]
    if not checks:
        yield Finding(file.name, "", f"a file that is checked ({', '.join(CHECKS)})", "another")
        return
    yield from checks[0](file)
    for document in file.documents:
        yield from check_secrets(file.name, document)
