"""API keys: a JSON file of hashes, who each key speaks for, and how a token is recognised.

    [{"tenant": "risk", "key_sha256": "9f86d0...", "roles": ["infer"], "tasks": ["fraud"],
      "rate": {"requests_per_s": 50, "rows_per_s": 20000}}]

A token is 256 random bits, so one round of SHA-256 is enough to keep it: there is no
dictionary to try.  It is printed once, where it is made, and stored nowhere.  A presented
token is hashed and compared with every entry in constant time.  The file is read again
when it changes, so a line taken out is a key withdrawn; a file that became unreadable
leaves the keys as they were and says so in the log.

``roles`` is infer and jobs unless given, ``tasks`` every task, ``rate`` that of
``cluster.caller.Rate``; the keys of one tenant share one rate.
"""

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from cluster.caller import Caller, Rate, Role
from cluster.errors import ConfigurationError
from cluster.names import is_name

LOG = logging.getLogger(__name__)
KEYS_VARIABLE: Final = "TRIMOE_API_KEYS"
TOKEN_PREFIX: Final = "trimoe_"  # noqa: S105 - lets secret scanners recognise a leaked key
TOKEN_BYTES = 32
KEY_ID_CHARS = 8  # of the hash; names a key in logs
RELOAD_PERIOD_S = 1.0
DEFAULT_ROLES: Final = frozenset({Role.INFER, Role.JOBS})


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of a file: digest of the token and what it opens."""

    entries: tuple[tuple[bytes, Caller], ...]

    def find(self, token: bytes) -> Caller | None:
        """Return the holder of a token; looks at every entry, whichever fits."""
        digest = hashlib.sha256(token).digest()
        found: Caller | None = None
        for expected, caller in self.entries:
            if hmac.compare_digest(digest, expected):
                found = caller
        return found


class KeyFile:
    """The keys of a file, as it is now.

    Args:
        path: The file.
        clock: Returns now, seconds, monotonic.

    Raises:
        ConfigurationError: It cannot be read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = _stamp_of(path)
        self._ring = load_keys(path)
        self._looked_at = clock()

    def find(self, token: bytes) -> Caller | None:
        """Return the holder of a token, if anybody holds it."""
        if self._clock() - self._looked_at >= RELOAD_PERIOD_S:
            self._looked_at = self._clock()
            self._reload()
        return self._ring.find(token)

    def _reload(self) -> None:
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._ring = load_keys(self._path)
        except ConfigurationError as error:
            LOG.error("keys stay as they were: %s", error)  # noqa: TRY400 - one line says it


def keys_path_from_environment() -> Path | None:
    """Return the file that the environment names, if it does."""
    named = os.environ.get(KEYS_VARIABLE)
    return Path(named) if named else None


def load_keys(path: Path) -> KeyRing:
    """Return the keys of a file.

    Raises:
        ConfigurationError: It is missing, or not as the module describes.
    """
    entries = tuple(_parse_entry(path, entry) for entry in _read(path))
    _check_together(path, entries)
    return KeyRing(entries)


def create_key(
    path: Path,
    tenant: str,
    *,
    roles: Sequence[Role] = (),
    tasks: Sequence[str] = (),
    rate: Rate | None = None,
) -> str:
    """Append a new key to a file, which may not exist yet, and return its token.

    Args:
        path: The file; only its owner may read it.
        tenant: Whom the key speaks for.
        roles: What it may do; infer and jobs if empty.
        tasks: Which tasks it may use; all if empty.
        rate: Of the tenant; None keeps the one it has.

    Raises:
        ConfigurationError: A name is none, or the file is not one of keys.
    """
    for name in (tenant, *tasks):
        if not is_name(name):
            message = f"expected letters, digits, '.', '_' or '-' as a name, got {name!r:.80}"
            raise ConfigurationError(message)
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    entry: dict[str, Any] = {
        "tenant": tenant,
        "key_sha256": hashlib.sha256(token.encode()).hexdigest(),
        "roles": sorted(roles or DEFAULT_ROLES),
    }
    before = _read(path) if path.exists() else []
    of_tenant = [each for each in before if each.get("tenant") == tenant]
    if tasks:
        entry["tasks"] = list(tasks)
    if rate is not None:
        entry["rate"] = asdict(rate)
    elif of_tenant and "rate" in of_tenant[0]:
        entry["rate"] = of_tenant[0]["rate"]
    after = [*before, entry]
    _check_together(path, tuple(_parse_entry(path, each) for each in after))
    _write(path, after)
    return token


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: expected a JSON file of API keys, got {type(error).__name__}"
        raise ConfigurationError(message + "; make one with trimoe keys create") from error
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        message = f"{path}: expected a list of API keys, got {type(entries).__name__}"
        raise ConfigurationError(message + "; make one with trimoe keys create")
    return entries


def _write(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(entries, indent=2) + "\n")
    draft.replace(path)


def _parse_entry(path: Path, entry: Mapping[str, Any]) -> tuple[bytes, Caller]:
    try:
        unknown = sorted(set(entry) - {"tenant", "key_sha256", "roles", "tasks", "rate"})
        _require(not unknown, f"no unknown field, {unknown}")
        digest = bytes.fromhex(entry["key_sha256"])
        _require(len(digest) == hashlib.sha256().digest_size, "key_sha256 of 64 digits, another")
        tasks = entry.get("tasks")
        _require(tasks is None or isinstance(tasks, list), "a list of tasks, another")
        for name in (entry["tenant"], *(tasks or ())):
            _require(isinstance(name, str) and is_name(name), "tenant and tasks as names, another")
        caller = Caller(
            key_id=digest.hex()[:KEY_ID_CHARS],
            tenant=entry["tenant"],
            roles=frozenset(map(Role, entry.get("roles", DEFAULT_ROLES))),
            tasks=None if tasks is None else frozenset(tasks),
            rate=_parse_rate(entry.get("rate", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        # Never the entry itself: someone may have put a token where a hash belongs.
        message = f"{path}: expected tenant, key_sha256, roles, tasks, rate; got {error!r:.120}"
        raise ConfigurationError(message) from None
    return digest, caller


def _parse_rate(values: Mapping[str, Any]) -> Rate:
    rate = Rate(**values)
    for name, value in asdict(rate).items():
        is_good = type(value) in {int, float} and 0 < value < math.inf
        _require(is_good, f"{name} above 0, {value!r:.20}")
    return rate


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(expected)


def _check_together(path: Path, entries: Sequence[tuple[bytes, Caller]]) -> None:
    if len({digest for digest, _ in entries}) != len(entries):
        message = f"{path}: expected each key once, got one twice; take one out"
        raise ConfigurationError(message)
    rates: dict[str | None, Rate | None] = {}
    for _, caller in entries:
        if rates.setdefault(caller.tenant, caller.rate) != caller.rate:
            message = f"{path}: expected one rate for tenant {caller.tenant!r}, got two"
            raise ConfigurationError(message + "; give all its keys the same")


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
