"""A local copy of one model that is kept behind a URL, checked against its manifest.

    URL/<model>/manifest.json, URL/<model>/model.safetensors   ->   CACHE/<digest>/<model>/...

A copy is complete or absent, and named by the digest of its weights, so that versions do not
mix and a second replica on the node finds the first one's.  The manifest is as trustworthy as
the connection it came over: use https, or a network of your own.
"""

import hashlib
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from cluster.errors import CheckpointError, ConfigurationError
from cluster.registry import MANIFEST_FILE, WEIGHTS_FILE, find_model

SCHEMES: Final = ("http://", "https://")
MAX_MANIFEST_BYTES: Final = 2**20  # ours have 1 KB
MAX_WEIGHTS_BYTES: Final = 8 * 2**30  # the large preset in float32, several times over
TIMEOUT_S = 30.0  # of one read, not of the whole file
CHUNK_BYTES: Final = 2**20


def default_cache() -> Path:
    """Return where copies are kept: the user's cache directory."""
    return Path.home() / ".cache" / "trimoe" / "models"


def mirror_model(url: str, name: str, cache: Path | None = None) -> Path:
    """Return a models directory that holds this model, fetched unless a copy is there.

    Args:
        url: Root of the models, http or https.
        name: Directory of the model below it.
        cache: Where copies are kept; None takes ``default_cache``.

    Raises:
        ConfigurationError: Not such a URL or name.
        CheckpointError: Nothing answers, or what came does not match its manifest.
    """
    if not url.startswith(SCHEMES):
        message = f"models: expected http:// or https://, got {url!r:.200}"
        raise ConfigurationError(message)
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        message = f"model: expected the name of a directory, got {name!r:.200}"
        raise ConfigurationError(message)
    root = f"{url.rstrip('/')}/{name}"
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        draft = Path(scratch, "draft")
        folder = draft / name
        folder.mkdir(parents=True)
        _fetch(f"{root}/{MANIFEST_FILE}", folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        copy = cache / _digest(folder / MANIFEST_FILE, root)[:32]
        if not (copy / name).is_dir():
            _fetch(f"{root}/{WEIGHTS_FILE}", folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES)
            find_model(draft, name).verify()
            _publish(draft, copy)
    return copy


def _digest(manifest: Path, root: str) -> str:
    try:
        digest = json.loads(manifest.read_text("utf-8"))["sha256"]
        if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size:
            return str(digest)
    except (ValueError, KeyError, TypeError) as error:
        message = f"{root}/{MANIFEST_FILE}: expected a manifest with sha256, got {error!r:.120}"
        raise CheckpointError(message) from error
    message = f"{root}/{MANIFEST_FILE}: expected a sha256 of 64 digits, got {digest!r:.120}"
    raise CheckpointError(message)


def _fetch(url: str, path: Path, max_bytes: int) -> None:
    """Write what is behind the URL to a file."""
    size = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, path.open("wb") as out:  # noqa: S310 - scheme checked
            while chunk := answer.read(CHUNK_BYTES):
                size += len(chunk)
                if size > max_bytes:
                    message = f"{url}: expected at most {max_bytes} bytes, got more"
                    raise CheckpointError(message)
                out.write(chunk)
    except (OSError, urllib.error.URLError) as error:
        message = f"{url}: expected a file of the model, got {error}; check models and model"
        raise CheckpointError(message) from error


def _publish(draft: Path, copy: Path) -> None:
    """Move the complete copy to its place; another replica's copy of the same is as good."""
    try:
        draft.rename(copy)
    except OSError as error:
        if not copy.is_dir():
            message = f"{copy}: expected to keep the copy there, got {error}"
            raise CheckpointError(message) from error
        shutil.rmtree(draft)
