"""Rules as data: named conditions on features, cards and terminals.

    {"code": "CARD_VELOCITY_1D", "then": "review",
     "feature": "CUSTOMER_ID_NB_TX_1DAY_WINDOW", "at_least": 30}
    {"code": "CARD_DENIED", "then": "block", "field": "card", "in": ["4711"]}

The strongest of the decisions wins: a "block" rule always blocks; else an
"approve" rule (allow list) approves; else "review" rules and the model count.
Amount limits and velocities are conditions on features; a feature that is
undefined (NaN) never meets one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apps.fraud.features import CONTEXT_NAMES
from apps.fraud.transaction import Transaction
from cluster.errors import ConfigurationError

APPROVE, REVIEW, BLOCK = "approve", "review", "block"
_KEYS = frozenset({"code", "then", "feature", "at_least", "at_most", "field", "in"})


@dataclass(frozen=True, slots=True)
class Rule:
    """One named condition and what follows from it.

    Args:
        code: Reason code that a decision carries when the rule hits.
        then: approve (allow list), review or block.
        feature: Name in ``CONTEXT_NAMES``; with ``at_least`` and ``at_most``, both included.
        field: "card" or "terminal"; with ``members``, the listed values.
    """

    code: str
    then: Literal["approve", "review", "block"]
    feature: str | None = None
    at_least: float = -np.inf
    at_most: float = np.inf
    field: Literal["card", "terminal"] | None = None
    members: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.then not in {APPROVE, REVIEW, BLOCK}:
            message = f"rule {self.code}: expected then approve, review or block, got {self.then!r}"
            raise ConfigurationError(message)
        if (self.feature is None) == (self.field is None):
            message = f"rule {self.code}: expected either a feature or a field"
            raise ConfigurationError(message)
        if self.feature is not None and self.feature not in CONTEXT_NAMES:
            message = f"rule {self.code}: unknown feature {self.feature!r}; known: {CONTEXT_NAMES}"
            raise ConfigurationError(message)
        if self.field not in {None, "card", "terminal"}:
            message = f"rule {self.code}: expected field card or terminal, got {self.field!r}"
            raise ConfigurationError(message)

    def hits(
        self, transactions: Sequence[Transaction], context: NDArray[np.floating[Any]]
    ) -> NDArray[np.bool_]:
        """Tell for each transaction whether the condition holds; context is [B, 24]."""
        if self.feature is None:
            values = [t.card if self.field == "card" else t.terminal for t in transactions]
            return np.fromiter((value in self.members for value in values), bool, len(values))
        column = context[:, CONTEXT_NAMES.index(self.feature)]
        return (column >= self.at_least) & (column <= self.at_most)


def parse_rule(entry: Mapping[str, Any]) -> Rule:
    """Build a rule from its JSON form.

    Raises:
        ConfigurationError: Missing or unknown key, or a value that cannot work.
    """
    if not isinstance(entry.get("code"), str) or not entry.keys() <= _KEYS:
        message = f"rule {entry!r:.80}: expected a code and keys among {sorted(_KEYS)}"
        raise ConfigurationError(message)
    fields = {("members" if key == "in" else key): value for key, value in entry.items()}
    if "members" in fields:
        fields["members"] = frozenset(map(str, fields["members"]))
    return Rule(**{"then": "", **fields})
