"""Container images by their names: pinned, and ours."""

import re
from typing import Final

OURS: Final = re.compile(
    r"(?:[\w.:-]+/)*trimoe/trimoe:(?P<version>[\w.]+)-ray(?P<ray>\d+\.\d+\.\d+)(?:@.*)?"
)
PINNED: Final = re.compile(
    r"[\w./:-]+?(:[\w.-]*\d[\w.-]*)(@sha256:[0-9a-f]{64})?|[\w./:-]+@sha256:[0-9a-f]{64}"
)
EXPECTED_PIN: Final = "a tag with a version, or a digest"


def is_pinned(name: object) -> bool:
    """Whether the same name means the same image tomorrow, as far as a tag can say."""
    return isinstance(name, str) and PINNED.fullmatch(name) is not None


def is_ours(name: object) -> bool:
    """Whether it is the platform's image."""
    return isinstance(name, str) and "trimoe/trimoe" in name


def ray_version(name: object) -> str | None:
    """Return the version of Ray that the tag of our image promises, None if it does not."""
    match = OURS.fullmatch(name) if isinstance(name, str) else None
    return match["ray"] if match else None
