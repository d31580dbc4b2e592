"""Every error that may cross a seam of the platform, in one tree.

    TrimoeError
    |-- InvalidRequestError      the caller's fault: shape, dtype, range or unknown task
    |-- UnknownModelError        no such model version or alias
    |-- UnknownJobError          the tenant has no job of that id, or it has expired
    |-- JobNotDoneError          the job has no result: it waits, runs or has failed
    |-- AccessDeniedError        the API key is not for this tenant, task or action
    |   `-- UnknownKeyError          there is no API key, or nobody knows it
    |-- CheckpointError          a weights file that is missing, altered or of another shape
    |-- ConfigurationError       a setting that cannot work; says which and what to set
    `-- UnavailableError         the platform's state: the same request may pass later
        |-- DeadlineExceededError    the deadline passed, or cannot be met and was refused early
        |-- QueueFullError           back-pressure: the bounded queue of the tenant is full
        |   `-- RateLimitError           the tenant's rate is used up; says when to come back
        `-- ReplicaLostError         the replica died while it held the request

Messages say what was expected, what came and what to do, in one line.
"""


class TrimoeError(Exception):
    """Base of all errors of this project."""


class InvalidRequestError(TrimoeError, ValueError):
    """The request can never succeed as it is."""


class UnknownModelError(TrimoeError, LookupError):
    """No model version or alias of that name is loaded."""


class UnknownJobError(TrimoeError, LookupError):
    """The tenant has no such job."""


class JobNotDoneError(TrimoeError):
    """The job has no result, or none yet."""


class AccessDeniedError(TrimoeError, PermissionError):
    """The caller is known and may not do this."""


class UnknownKeyError(AccessDeniedError):
    """The caller is not known."""


class CheckpointError(TrimoeError, ValueError):
    """A checkpoint is missing, altered or does not fit its configuration."""


class ConfigurationError(TrimoeError, ValueError):
    """A setting is missing or contradicts another one."""


class UnavailableError(TrimoeError):
    """The platform cannot answer now; the same request may succeed later."""


class DeadlineExceededError(UnavailableError):
    """The deadline has passed, or the predicted finish lies behind it.

    Args:
        message: One line.
        retry_after_s: Seconds until the same request would fit, as predicted; 0 if unknown.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(UnavailableError):
    """The bounded queue of this tenant is full."""


class RateLimitError(QueueFullError):
    """The tenant has used up its rate.

    Args:
        message: One line.
        retry_after_s: Seconds until the same request would pass.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ReplicaLostError(UnavailableError):
    """The replica died before it answered."""
