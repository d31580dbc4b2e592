"""Publishing a bundle: proven here first, then signed in every form that boxes can use."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from apps.maintenance.edge.bundle import INFO, BundleInfo, unpack, write_bundle
from apps.maintenance.edge.forecast import Forecaster
from apps.maintenance.sync.deltas import Form, parcels_of
from apps.maintenance.sync.offers import EVERY_GROUP, Offer, offers_of
from apps.maintenance.sync.repository import File, Repository
from cluster.errors import ConfigurationError

MAX_BASES = 4  # recent versions a difference is made to; older boxes take the whole


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to go back to an older version.

    Args:
        from_versions: What boxes may run when they go back.
        until: When it ends.
    """

    from_versions: tuple[int, ...]
    until: datetime


def publish_bundle(
    repository: Repository, packed: bytes, groups: Sequence[str] = (EVERY_GROUP,)
) -> Offer:
    """Prove a bundle on its own golden batch, then sign it (see ``sign_bundle``).

    Raises:
        RefusedError: It does not pass its own golden batch.
    """
    prove(packed)
    return sign_bundle(repository, packed, groups)


def sign_bundle(
    repository: Repository, packed: bytes, groups: Sequence[str] = (EVERY_GROUP,)
) -> Offer:
    """Sign a bundle in every form that boxes can use.

    Args:
        repository: With the keys that must sign.
        packed: The bundle.
        groups: Fleet groups it is for.

    Returns:
        What boxes will see of it, the routes smallest first.

    Raises:
        ConfigurationError: It is no bundle, its version is taken, or keys are missing.
    """
    info = BundleInfo.from_json(unpack(packed)[INFO])
    present = offers_of(repository.targets.targets)
    name = f"{info.task}-{info.variant}/{info.version}"
    if any(each.path == f"{name}.tar" for each in present):
        message = f"{name}: expected a new version, got one that was published"
        raise ConfigurationError(message)
    bases = _bases_of(repository, [each for each in present if _family(each) == _family_of(info)])
    files: dict[str, File] = {}
    forms = []
    for parcel in parcels_of(packed, {digest: data for digest, (_, data) in bases.items()}):
        suffix = f"from-{bases[parcel.base][0]}.{parcel.form}" if parcel.base else parcel.form
        path = f"{name}.tar" if parcel.form is Form.PLAIN else f"{name}.{suffix}"
        forms.append({"path": path, "form": str(parcel.form), "base": parcel.base})
        files[path] = File(parcel.data, {"of": f"{name}.tar"})
    custom: dict[str, Any] = {
        "version": info.version,
        "task": info.task,
        "variant": info.variant,
        "groups": list(groups),
        "forms": forms,
    }
    files[f"{name}.tar"] = File(packed, custom)
    repository.publish(files)
    return find_offer(repository, f"{name}.tar")


def permit_downgrade(repository: Repository, path: str, permit: Permit) -> None:
    """Sign leave to go back to a version that was published before.

    Raises:
        ConfigurationError: It was not, or keys are missing.
    """
    offer = find_offer(repository, path)
    target = repository.targets.targets[path]
    until = permit.until.isoformat()
    custom = {**(target.custom or {}), "downgrade": {"from": permit.from_versions, "until": until}}
    data = repository.path_of(target).read_bytes()
    repository.publish({offer.path: File(data, custom)})


def find_offer(repository: Repository, path: str) -> Offer:
    """Return a bundle that was published.

    Raises:
        ConfigurationError: There is none of that name.
    """
    targets = repository.targets.targets
    if path not in targets or "forms" not in (targets[path].custom or {}):
        names = ", ".join(each.path for each in offers_of(targets)) or "none"
        message = f"{path}: expected a published bundle, there are: {names}"
        raise ConfigurationError(message)
    return Offer.from_target(targets[path], targets)


def prove(packed: bytes) -> float:
    """Return the largest difference of a bundle from its golden batch.

    Raises:
        ConfigurationError, RefusedError: It is no bundle, or does not pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder), packed)
        return Forecaster(Path(folder)).prove()


def _bases_of(repository: Repository, present: Sequence[Offer]) -> dict[str, tuple[int, bytes]]:
    """Return version and bytes of the newest bundles, by digest."""
    found = {}
    for offer in present[-MAX_BASES:]:
        data = repository.path_of(repository.targets.targets[offer.path]).read_bytes()
        if sha256(data).hexdigest() == offer.digest:
            found[offer.digest] = offer.version, data
    return found


def _family(offer: Offer) -> str:
    return offer.path.partition("/")[0]


def _family_of(info: BundleInfo) -> str:
    return f"{info.task}-{info.variant}"
