"""A repository on a stick, for plants without a network: what a box needs, nothing else.

All roots, the present metadata, and one bundle in every form; ``wanted.json`` says which.  The
box verifies as it does over HTTP; a stick older than the timestamp's lifetime has expired.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from apps.maintenance.edge.stick import WANTED
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.repository import Repository
from cluster.errors import ConfigurationError


def export_stick(repository: Repository, offer: Offer, out: Path) -> Sequence[Path]:
    """Write a stick; return its files.

    Raises:
        ConfigurationError: The folder holds something already.
    """
    if out.exists() and any(out.iterdir()):
        message = f"{out}: expected an empty folder, it holds something"
        raise ConfigurationError(message)
    written = []
    snapshot = repository.snapshot
    names = [path.name for path in repository.metadata.glob("*.root.json")]
    names += [f"{snapshot.version}.snapshot.json", "timestamp.json"]
    names += [f"{snapshot.meta['targets.json'].version}.targets.json"]
    targets = repository.targets.targets
    paths = [repository.path_of(targets[route.path]) for route in offer.routes]
    for path in [*(repository.metadata / name for name in names), *paths]:
        copy = out / path.relative_to(repository.metadata.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        written.append(copy)
    (out / WANTED).write_text(json.dumps({"wanted": offer.path}))
    return [*written, out / WANTED]
