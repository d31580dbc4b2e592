"""Every error that may cross a seam of the platform, in one tree.

    TrimoeError
    |-- InvalidRequestError      the caller's fault: shape, dtype, range or unknown task
    |-- UnknownModelError        no such model version or alias
    |-- CheckpointError          a weights file that is missing, altered or of another shape
    |-- ConfigurationError       a setting that cannot work; says which and what to set
    `-- UnavailableError         the platform's state: the same request may pass later
        |-- DeadlineExceededError    the deadline passed, or cannot be met and was refused early
        |-- QueueFullError           back-pressure: the bounded queue of the tenant is full
        `-- ReplicaLostError         the replica died while it held the request

Messages say what was expected, what came and what to do, in one line.
"""


class TrimoeError(Exception):
    """Base of all errors of this project."""


class InvalidRequestError(TrimoeError, ValueError):
    """The request can never succeed as it is."""


class UnknownModelError(TrimoeError, LookupError):
    """No model version or alias of that name is loaded."""


class CheckpointError(TrimoeError, ValueError):
    """A checkpoint is missing, altered or does not fit its configuration."""


class ConfigurationError(TrimoeError, ValueError):
    """A setting is missing or contradicts another one."""


class UnavailableError(TrimoeError):
    """The platform cannot answer now; the same request may succeed later."""


class DeadlineExceededError(UnavailableError):
    """The deadline has passed, or the predicted finish lies behind it."""


class QueueFullError(UnavailableError):
    """The bounded queue of this tenant is full."""


class ReplicaLostError(UnavailableError):
    """The replica died before it answered."""
