"""What a name may look like that comes from outside: models, tenants, tasks, request ids.

Names end in paths, labels, log lines and messages, so they are short plain words:
no slash, no two dots in a row, no blank, no control character.
"""

import re
from typing import Final

from cluster.errors import InvalidRequestError
from cluster.schemas import MAX_ID_LENGTH

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_\-]*(\.[A-Za-z0-9_\-]+)*$"
REQUEST_ID_PATTERN: Final = r"^[A-Za-z0-9._:/+=@\-]+$"
_NAME: Final = re.compile(NAME_PATTERN)
_REQUEST_ID: Final = re.compile(REQUEST_ID_PATTERN)


def is_name(text: str) -> bool:
    """Return whether a text may name a model, a tenant or a task."""
    return len(text) <= MAX_ID_LENGTH and _NAME.fullmatch(text) is not None


def is_request_id(text: str) -> bool:
    """Return whether a text may identify a request."""
    return len(text) <= MAX_ID_LENGTH and _REQUEST_ID.fullmatch(text) is not None


def check_name(what: str, text: str) -> str:
    """Return the name.

    Raises:
        InvalidRequestError: It is none.
    """
    if not is_name(text):
        expected = f"1 to {MAX_ID_LENGTH} letters, digits, '_' or '-', in parts between dots"
        message = f"{what}: expected {expected}, got {text!r:.80}"
        raise InvalidRequestError(message)
    return text
