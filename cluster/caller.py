"""Who asks over HTTP and what they may do: decided by their API key, not by their request."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cluster.errors import AccessDeniedError

OPEN_TENANT: Final = "local"  # of a request that names none, where no keys are needed


class Role(StrEnum):
    """What a key may do."""

    INFER = "infer"  # ask, and see which models there are
    JOBS = "jobs"  # submit batch jobs and fetch their results
    METRICS = "metrics"  # read the platform's metrics, which name every tenant


@dataclass(frozen=True, slots=True)
class Rate:
    """What a tenant may ask for, on average.

    Args:
        requests_per_s: HTTP requests.
        rows_per_s: Rows of features.
    """

    requests_per_s: float = 100.0
    rows_per_s: float = 100_000.0


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of an API key.

    Args:
        key_id: Names the key in logs; tells nothing about its secret.
        tenant: Whom the key speaks for; None lets the request say (open access).
        roles: What it may do.
        tasks: Which tasks it may use; None is all.
        rate: How much of it; None is any.
    """

    key_id: str
    tenant: str | None
    roles: frozenset[Role]
    tasks: frozenset[str] | None = None
    rate: Rate | None = None

    def require(self, role: Role) -> None:
        """Refuse what the key has no role for.

        Raises:
            AccessDeniedError: It lacks the role.
        """
        if role not in self.roles:
            message = (
                f"key {self.key_id}: expected the role {role.value!r}, got {sorted(self.roles)}"
            )
            raise AccessDeniedError(message + "; use a key that has it")

    def require_task(self, task: str) -> None:
        """Refuse a task the key is not for.

        Raises:
            AccessDeniedError: It is for other tasks.
        """
        if self.tasks is not None and task not in self.tasks:
            message = f"key {self.key_id}: expected a task among {sorted(self.tasks)}, got {task!r}"
            raise AccessDeniedError(message + "; use a key that has it")

    def speak_for(self, named: str | None) -> str:
        """Return the tenant of a request.

        Args:
            named: The tenant that the request names, if it does.

        Raises:
            AccessDeniedError: It names another tenant than the key's.
        """
        if self.tenant is None:
            return named or OPEN_TENANT
        if named not in (None, self.tenant):
            message = f"tenant: expected {self.tenant!r}, whose key this is, got {named!r:.80}"
            raise AccessDeniedError(message + "; use that tenant's key")
        return self.tenant


OPEN_CALLER: Final = Caller(key_id="open", tenant=None, roles=frozenset(Role))
