"""What import-linter cannot see: runtime imports, package owners, extras and names."""

import ast
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("apps", "benchmarks", "cluster", "core_model", "kernels")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
INSTALLED = {canonicalize_name(found.metadata["Name"]) for found in distributions()}
OWNERS = packages_distributions()
HEAVY = ("torch", "triton", "ray", "kernels", "core_model", "kafka")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_owns_our_package_names(package: str) -> None:
    assert set(OWNERS[package]) == {"trimoe"}


@pytest.mark.parametrize(
    "module", ["apps.cli", "apps.fraud.service", "cluster.client", "cluster.schemas"]
)
def test_importing_the_light_half_pulls_in_nothing_heavy(module: str) -> None:
    probe = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["ray", "torch"])
@pytest.mark.parametrize("module", ["cluster.scheduler", "cluster.cost"])
def test_policy_runs_without_ray_and_torch(module: str, name: str) -> None:
    probe = f"import sys; sys.modules[{name!r}] = None; import {module}"
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=ROOT)


def test_init_files_hold_a_docstring_and_nothing_else() -> None:
    for path in (path for path in MODULES if path.name == "__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert ast.get_docstring(ast.Module(body, [])), path


def test_no_module_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    names = {path: set(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    assert not [path for path, parts in names.items() if parts & drawers]


def required_by(extra: str) -> set[str]:
    """Return the distributions that ``trimoe[extra]`` asks for, and what those ask for in turn."""
    todo = [Requirement(f"trimoe[{extra}]" if extra else "trimoe")]
    found: dict[str, set[str]] = {}
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if extras <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(extras)
        lines = requires(name) or [] if name in INSTALLED else []
        todo += [
            needed
            for needed in map(Requirement, lines)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras)
        ]
    return found.keys() - {"trimoe"}


def test_the_base_install_is_numpy() -> None:
    assert required_by("") == {"numpy"}


def test_the_edge_brings_neither_torch_nor_ray() -> None:
    brought = required_by("edge")
    assert {"numpy", "onnxruntime", "tuf"} <= brought
    assert not brought & {"torch", "ray", "triton", "kafka-python", "pandas"}
    assert {"torch", "ray"} <= required_by("platform")  # so the walk does find them
