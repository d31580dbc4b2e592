"""Operators decide over rollouts, and sign what they decide.

A signature (Ed25519) is over the canonical JSON of the decision, which names the rollout, its
bundle and its stage: it cannot be used for another one.  ``issued_at`` must be later than the
last decision over the rollout, so it cannot be used twice either.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from cluster.errors import AccessDeniedError, ConfigurationError, InvalidRequestError


class Action(StrEnum):
    """What an operator may decide."""

    APPROVE = "approve"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision over a rollout.

    Args:
        rollout: Its number.
        digest: sha256 of its bundle.
        stage: At which it stands.
        action: What is decided.
        operator: Who decides.
        issued_at: When, seconds since 1970.
    """

    rollout: int
    digest: str
    stage: int
    action: Action
    operator: str
    issued_at: float

    def to_bytes(self) -> bytes:
        """Return what is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    def sign(self, key: Ed25519PrivateKey) -> "SignedDecision":
        """Return the decision with a signature."""
        return SignedDecision(self, key.sign(self.to_bytes()))


@dataclass(frozen=True, slots=True)
class SignedDecision:
    """A decision with its signature."""

    decision: Decision
    signature: bytes

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """Return what came over a wire.

        Raises:
            InvalidRequestError: It is not a signed decision.
        """
        try:
            fields = dict(record)
            signature = bytes.fromhex(str(fields.pop("signature")))
            action = Action(str(fields.pop("action")))
            return cls(Decision(**fields, action=action), signature)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            message = f"decision: expected the fields of a signed decision, got {error!r:.100}"
            raise InvalidRequestError(message) from error

    def to_record(self) -> dict[str, object]:
        """Return what goes over a wire."""
        return {**asdict(self.decision), "signature": self.signature.hex()}


class Operators:
    """Public keys of those who may decide: ``<name>.pub`` in a folder, read at each decision.

    Args:
        folder: Of keys; may be empty, then nobody may.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, signed: SignedDecision) -> None:
        """Pass a decision that its operator signed.

        Raises:
            AccessDeniedError: Nobody knows the operator, or the signature is another's.
            ConfigurationError: The file of the operator holds something else.
        """
        paths = {path.stem: path for path in sorted(self._folder.glob("*.pub"))}
        path = paths.get(signed.decision.operator)
        if path is None:
            names = ", ".join(paths) or "none"
            message = f"operator: expected one of {names}, got {signed.decision.operator!r:.40}"
            raise AccessDeniedError(message)
        try:
            _public_key(path).verify(signed.signature, signed.decision.to_bytes())
        except InvalidSignature as error:
            message = f"decision: expected a signature of {signed.decision.operator}, got another"
            raise AccessDeniedError(message) from error


def write_operator(folder: Path, name: str, key: Ed25519PublicKey) -> None:
    """Let somebody decide."""
    folder.mkdir(parents=True, exist_ok=True)
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(pem)


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        found = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        message = f"{path.name}: expected an Ed25519 public key in PEM"
        raise ConfigurationError(message) from error
    if not isinstance(found, Ed25519PublicKey):
        message = f"{path.name}: expected an Ed25519 key, got {type(found).__name__}"
        raise ConfigurationError(message)
    return found
