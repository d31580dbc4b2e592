"""Signatures of the repository's metadata: who signs, and whether enough have.

Knows: keys and roles.  Does not know: files, targets, the order in which things are written.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Metadata, Root, Snapshot, Targets, Timestamp

from cluster.errors import ConfigurationError

LIFETIMES = {  # a box that is offline for longer trusts nothing new until it hears again
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=180),
    Snapshot.type: timedelta(days=30),
    Timestamp.type: timedelta(days=7),
}


def first_root(
    signers: Mapping[str, Sequence[CryptoSigner]], thresholds: Mapping[str, int], expires: datetime
) -> Root:
    """Return the root of a new repository, unsigned."""
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    for role in sorted(TOP_LEVEL_ROLE_NAMES):
        for signer in signers[role]:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = thresholds[role]
    return root


def sign(
    metadata: Metadata[Any], roots: Sequence[Root], signers: Sequence[CryptoSigner]
) -> Metadata[Any]:
    """Sign with every key that one of the roots gives the role."""
    role = metadata.signed.type
    key_ids = {key_id for root in roots for key_id in root.roles[role].keyids}
    for signer in signers:
        if signer.public_key.keyid in key_ids:
            metadata.sign(signer, append=True)
    return metadata


def check_signed(metadata: Metadata[Any], root: Root) -> None:
    """Pass metadata that enough keys of its role have signed.

    Raises:
        ConfigurationError: Too few have.
    """
    role = metadata.signed.type
    try:
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        if role == Root.type:
            metadata.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as error:
        message = f"{role}: expected enough of its keys, got: {error}"
        raise ConfigurationError(message) from error
    except RepositoryError as error:
        raise ConfigurationError(str(error)) from error


def check_keys(root: Root, signers: Sequence[CryptoSigner], roles: Sequence[str]) -> None:
    """Pass if enough keys of all roles are at hand.

    Raises:
        ConfigurationError: They are not.
    """
    at_hand = {signer.public_key.keyid for signer in signers}
    for role in roles:
        needed = root.roles[role]
        num = len(at_hand & set(needed.keyids))
        if num < needed.threshold:
            message = f"{role}: expected {needed.threshold} of its keys, got {num}"
            raise ConfigurationError(message)
