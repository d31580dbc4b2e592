"""Evidence of a batch: a signed manifest, and the check of all it says.

Rules:
    1. The signature (Ed25519, RFC 8032) is over the bytes of the manifest, which hold the
       sha256 of every output.  The private key never lies with the evidence.
    2. A check passes if the signature is that of the public key, every file is as listed,
       none is missing, no other lies in ``cases/``, and a random sample of cases comes out
       the same when it is run again.
    3. The public key beside the manifest proves that nothing was altered by accident; who
       signed is proved by a key the reader already trusts.
"""

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from apps.imaging.batch.layout import Layout
from apps.imaging.batch.manifest import canonical, read_manifest, summary_of, write_whole
from apps.imaging.batch.process import Record
from apps.imaging.batch.repeatability import TOLERANCE, Run, differences
from apps.imaging.outputs.summary import CaseSummary
from cluster.errors import ConfigurationError

OWN = 0o600
FINGERPRINT_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one case.

    Args:
        case_id: Which.
        is_rerun: Whether it was run again.
        problems: What is wrong; empty if nothing.
    """

    case_id: str
    is_rerun: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found of a batch.

    Args:
        signer: Fingerprint of the public key that the signature belongs to; empty if none.
        problems: With the manifest, its signature or files of no case.
        verdicts: One for every case in the manifest.
    """

    signer: str
    problems: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def has_passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not any(each.problems for each in self.verdicts)


class Rerun(Protocol):
    """Runs cases of a batch again."""

    def __call__(self, case_ids: Sequence[str], out: Path, /) -> Mapping[str, CaseSummary]:
        """Run cases and return their summaries, by id, outputs relative to ``out``."""
        ...


def default_key_path() -> Path:
    """Return where this user's signing key lies."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "trimoe" / "imaging_signing_key.pem"


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a file; make one, for its owner alone, if there is none.

    Raises:
        ConfigurationError: The file holds something else, or others may read it.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, pem, OWN)
    mode = path.stat().st_mode & 0o777
    if mode & ~OWN:
        message = f"signing key: expected mode 600, got {mode:o}; chmod 600 it"
        raise ConfigurationError(message)
    try:
        found = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        message = "signing key: expected an Ed25519 key in PEM without a password"
        raise ConfigurationError(message) from error
    if not isinstance(found, Ed25519PrivateKey):
        message = f"signing key: expected an Ed25519 key, got {type(found).__name__}"
        raise ConfigurationError(message)
    return found


def public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in a file.

    Raises:
        FileNotFoundError: There is none.
        ConfigurationError: The file holds something else.
    """
    try:
        found = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        message = "public key: expected an Ed25519 key in PEM"
        raise ConfigurationError(message) from error
    if not isinstance(found, Ed25519PublicKey):
        message = f"public key: expected an Ed25519 key, got {type(found).__name__}"
        raise ConfigurationError(message)
    return found


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return what a person compares of a key."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:FINGERPRINT_DIGITS]


def publish(layout: Layout, manifest: Record, key: Ed25519PrivateKey) -> None:
    """Write a manifest with its signature; where a manifest is, its signature is too."""
    layout.manifest.unlink(missing_ok=True)
    data = canonical(manifest)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_whole(layout.public_key, pem)
    write_whole(layout.signature, key.sign(data))
    write_whole(layout.manifest, data)


def verify(
    layout: Layout,
    *,
    num_sample: int,
    seed: int,
    rerun: Rerun,
    work: Path,
    trusted: Ed25519PublicKey | None = None,
) -> Verification:
    """Check a batch that was run.

    Args:
        layout: Of its directory.
        num_sample: Cases to run again; no more than there are.
        seed: Chooses them.
        rerun: Runs them.
        work: Empty directory for that.
        trusted: Key that must have signed; None takes the one beside the manifest.

    Raises:
        FileNotFoundError, ConfigurationError: There is no manifest that can be read.
    """
    signer, problem = _check_signature(layout, trusted)
    if problem:  # then nothing it says can be relied on
        return Verification(signer, (problem,), ())
    manifest = read_manifest(layout.manifest)
    of_case, problems = _check_files(layout, manifest)
    summaries = {record["case_id"]: summary_of(record) for record in manifest["cases"]}
    problems += [each for case_id in of_case.keys() - summaries for each in of_case[case_id]]
    sample = sample_of(sorted(summaries), num_sample, seed)
    again = rerun(sample, work) if sample else {}
    for case_id in sample:
        found = ["was not run again: the input has no such case"]
        if case_id in again:
            first, second = Run(summaries[case_id], layout.root), Run(again[case_id], work)
            found = list(differences(first, second, TOLERANCE))
        of_case.setdefault(case_id, []).extend(found)
    verdicts = tuple(
        Verdict(case_id, case_id in again, tuple(of_case.get(case_id, ()))) for case_id in summaries
    )
    return Verification(signer, tuple(problems), verdicts)


def sample_of(case_ids: Sequence[str], num: int, seed: int) -> Sequence[str]:
    """Return a random sample, the same for the same seed."""
    chosen = random.Random(seed).sample(case_ids, min(num, len(case_ids)))  # noqa: S311 - no secret
    return sorted(chosen)


def _check_signature(layout: Layout, trusted: Ed25519PublicKey | None) -> tuple[str, str]:
    """Return the fingerprint of the key, and what is wrong with the signature, if anything."""
    data = layout.manifest.read_bytes()
    try:
        key = trusted or public_key(layout.public_key)
        signature = layout.signature.read_bytes()
    except (FileNotFoundError, ConfigurationError):
        return "", "signature: expected manifest.sig and manifest.pub, one is missing or no key"
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return "", f"signature: is not that of key {fingerprint(key)} over this manifest"
    return fingerprint(key), ""


def _check_files(layout: Layout, manifest: Record) -> tuple[dict[str, list[str]], list[str]]:
    """Return what is wrong with the files of each case, and with those of none."""
    of_case: dict[str, list[str]] = {}
    others: list[str] = []
    listed = {layout.root / path: facts for path, facts in manifest["files"].items()}
    present = {path for path in layout.cases.rglob("*") if not path.is_dir()}
    for path in sorted(listed.keys() | present):
        problem = _problem_of(path, listed.get(path), layout.root)
        if problem:
            parts = path.relative_to(layout.root).parts
            is_of_case = parts[0] == layout.cases.name and len(parts) > 2
            (of_case.setdefault(parts[1], []) if is_of_case else others).append(problem)
    return of_case, others


def _problem_of(path: Path, facts: Record | None, root: Path) -> str:
    """Return what is wrong with a file, empty if nothing."""
    name = path.relative_to(root).as_posix()
    if facts is None:
        return f"{name}: is not in the manifest"
    if path.is_symlink() or not path.is_file():
        return f"{name}: is missing"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == facts["sha256"] else f"{name}: was altered"
