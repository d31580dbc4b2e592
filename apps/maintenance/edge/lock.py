"""One agent per state folder: two writers would move the pointer under each other."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigurationError

LOCK = "lock"


class AgentRunsError(ConfigurationError):
    """Another process is the agent of this box."""


@contextmanager
def sole_agent(state: Path) -> Iterator[None]:
    """Hold a state folder while the block runs; the kernel frees it after a kill.

    Raises:
        AgentRunsError: Another process holds it.
    """
    fd = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{state}: expected no other agent, one is running; stop it first"
            raise AgentRunsError(message) from error
        yield
    finally:
        os.close(fd)
