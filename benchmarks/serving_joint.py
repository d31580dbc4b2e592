"""Case ``joint``: hot swaps, canary, promotion and rollback under mixed load, one replica."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.serving_joint_changes import Plan, copies, measure
from benchmarks.serving_rig import Rig, deployed
from cluster.deployments import CoreReplica
from cluster.loading import RegistrySource


def run_joint(rig: Rig, checkpoint: Path) -> dict[str, Any]:
    """Return answers, errors and versions by phase and task, p99 and the canary's share."""
    with TemporaryDirectory(prefix="trimoe-joint-") as folder:
        registry = copies(checkpoint, Path(folder))
        source = RegistrySource(registry, rig.device)
        with deployed(CoreReplica, source, gpus=rig.gpus) as client:
            return measure(client, registry, Plan(rig.seconds))
