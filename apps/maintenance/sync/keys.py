"""Signing keys: one Ed25519 key per file, each for its holder alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from apps.maintenance.edge.durable import write_whole
from cluster.errors import ConfigurationError

OWN = 0o600
_NAME = re.compile(r"(root|targets|snapshot|timestamp)-\d+\.pem")


def make_key(path: Path) -> CryptoSigner:
    """Make a key; the file is readable for its owner alone.

    Raises:
        ConfigurationError: There is a file already.
    """
    if path.exists():
        message = f"{path.name}: expected no such file; a key is never overwritten"
        raise ConfigurationError(message)
    path.parent.mkdir(parents=True, exist_ok=True)
    signer = CryptoSigner.generate_ed25519()
    write_whole(path, signer.private_bytes, OWN)
    return signer


def load_key(path: Path) -> CryptoSigner:
    """Return the key in a file.

    Raises:
        FileNotFoundError: There is none.
        ConfigurationError: The file holds something else, or others may read it.
    """
    return CryptoSigner(load_private_key(path))


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a file (see ``load_key``)."""
    mode = path.stat().st_mode & 0o777
    if mode & ~OWN:
        message = f"{path.name}: expected mode 600, got {mode:o}; chmod 600 it"
        raise ConfigurationError(message)
    try:
        found = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        message = f"{path.name}: expected an Ed25519 key in PEM without a password"
        raise ConfigurationError(message) from error
    if not isinstance(found, Ed25519PrivateKey):
        message = f"{path.name}: expected an Ed25519 key, got {type(found).__name__}"
        raise ConfigurationError(message)
    return found


def make_keys(folder: Path, numbers: Mapping[str, int]) -> Sequence[CryptoSigner]:
    """Make keys ``<role>-<n>.pem``, that many for each role."""
    return [
        make_key(folder / f"{role}-{idx}.pem")
        for role, number in numbers.items()
        for idx in range(1, number + 1)
    ]


def load_keys(folders: Iterable[Path]) -> Sequence[CryptoSigner]:
    """Return all role keys in folders.

    Raises:
        FileNotFoundError: There is none at all.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("*.pem"))]
    found = [load_key(path) for path in paths if _NAME.fullmatch(path.name)]
    if not found:
        message = "keys: expected files such as targets-1.pem in the folder of keys"
        raise FileNotFoundError(message)
    return found
