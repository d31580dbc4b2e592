"""From model outputs and rules to one decision per transaction, with its reasons.

Thresholds and rules are data (``policy.json``) with a version that every decision
carries.  Knows the columns of the fraud task's outputs; knows no Kafka.

Legend: B transactions, C 24 context features, D_out output columns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.fraud.features import CONTEXT_NAMES
from apps.fraud.rules import APPROVE, BLOCK, REVIEW, Rule, parse_rule
from apps.fraud.stream import Record
from apps.fraud.transaction import Transaction
from cluster.errors import ConfigurationError

DECISIONS = (APPROVE, REVIEW, BLOCK)
LOGIT_COLUMN = 0
FIRST_CONTRIBUTION = 4  # after logit, tree_logit, sequence_logit, gate
_CLIP_LOGIT = 60.0  # exp() stays finite; the probability is 0 or 1 to 26 digits by then


@dataclass(frozen=True)
class Policy:
    """Thresholds and rules of one version.

    Args:
        version: Written into every decision as ``rules_version``.
        review_at: Calibrated probability of fraud from which a person looks.
        block_at: Calibrated probability of fraud from which the payment stops.
        num_reasons: Model reasons per decision, at most.
        min_contribution: Logit units; smaller contributions are no reasons.
        rules: Evaluated with the score, see ``apps.fraud.rules``.
    """

    version: str
    review_at: float
    block_at: float
    num_reasons: int
    min_contribution: float
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.review_at <= self.block_at <= 1.0:
            message = (
                "policy: expected 0 <= review_at <= block_at <= 1, "
                f"got {self.review_at} and {self.block_at}"
            )
            raise ConfigurationError(message)

    @cached_property
    def model_codes(self) -> tuple[str, ...]:
        """Reason codes of the model, one per context feature."""
        return tuple(f"MODEL_{name}" for name in CONTEXT_NAMES)


def load_policy(path: Path | None = None) -> Policy:
    """Return the policy of a JSON file, or the one that is shipped.

    Raises:
        ConfigurationError: Unreadable, a missing or unknown key, or values that cannot work.
    """
    source = resources.files("apps.fraud") / "policy.json" if path is None else path
    try:
        entries: dict[str, Any] = json.loads(source.read_text())
        entries.pop("units", None)
        rules = tuple(parse_rule(entry) for entry in entries.pop("rules", ()))
        return Policy(**entries, rules=rules)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        message = f"policy {source}: {error}"
        raise ConfigurationError(message) from error


class Verdicts(NamedTuple):
    """What was decided for B transactions.

    ``codes`` index ``DECISIONS`` (int64 [B]), ``scores`` are calibrated
    probabilities (float64 [B]), ``reasons`` hold the reason codes of each.
    """

    codes: NDArray[np.int64]
    scores: NDArray[np.float64]
    reasons: list[tuple[str, ...]]


def decide(
    policy: Policy,
    transactions: Sequence[Transaction],
    context: NDArray[np.floating[Any]],
    outputs: NDArray[np.floating[Any]],
) -> Verdicts:
    """Combine rules and model into one decision per transaction.

    Args:
        policy: Thresholds and rules.
        transactions: What is decided.
        context: Their context features [B, 24], for the rules.
        outputs: Model outputs [B, 28], finite.
    """
    logits = np.clip(outputs[:, LOGIT_COLUMN].astype(np.float64), -_CLIP_LOGIT, _CLIP_LOGIT)
    scores = 1.0 / (1.0 + np.exp(-logits))
    codes = (scores >= policy.review_at).astype(np.int64) + (scores >= policy.block_at)
    reasons = _model_reasons(policy, outputs[:, FIRST_CONTRIBUTION:])
    hits = [(rule, rule.hits(transactions, context)) for rule in policy.rules]
    for wanted in (REVIEW, APPROVE, BLOCK):  # rising strength
        code = DECISIONS.index(wanted)
        for rule, hit in hits:
            if rule.then == wanted and hit.any():
                codes[hit] = np.maximum(codes[hit], code) if wanted == REVIEW else code
                for i in np.flatnonzero(hit):
                    reasons[i] = (rule.code, *reasons[i])
    return Verdicts(codes, scores, reasons)


def _model_reasons(
    policy: Policy, contributions: NDArray[np.floating[Any]]
) -> list[tuple[str, ...]]:
    order = np.argsort(-contributions, axis=1)[:, : policy.num_reasons]
    largest = np.take_along_axis(contributions, order, axis=1)
    counts = (largest > policy.min_contribution).sum(axis=1)
    names = policy.model_codes
    return [
        tuple([names[j] for j in row[:count]])
        for row, count in zip(order.tolist(), counts.tolist(), strict=True)
    ]


class Provenance(NamedTuple):
    """What one decision rests on."""

    model_version: str
    rules_version: str
    features_digest: str


def encode_decisions(
    verdicts: Verdicts,
    records: Sequence[Record],
    transactions: Sequence[Transaction],
    provenance: Sequence[Provenance],
    now_ms: int,
) -> list[bytes]:
    """Return the decisions as JSON, one per transaction; built by hand for speed."""
    texts: dict[object, str] = {}
    encoded: list[bytes] = []
    for code, score, reasons, record, transaction, source in zip(
        verdicts.codes.tolist(),
        verdicts.scores.tolist(),
        verdicts.reasons,
        records,
        transactions,
        provenance,
        strict=True,
    ):
        for value in (reasons, record.topic, source.model_version, source.rules_version):
            if value not in texts:
                texts[value] = json.dumps(value)
        identifier = transaction.transaction_id
        encoded.append(
            f'{{"transaction_id":{identifier if isinstance(identifier, int) else json.dumps(identifier)}'
            f',"decision":"{DECISIONS[code]}","score":{score:.9g},"reasons":{texts[reasons]}'
            f',"model_version":{texts[source.model_version]}'
            f',"rules_version":{texts[source.rules_version]}'
            f',"features_digest":"{source.features_digest}"'
            f',"event_time_ms":{transaction.time_ms}'
            f',"input":{{"topic":{texts[record.topic]},"partition":{record.partition}'
            f',"offset":{record.offset},"timestamp":{record.timestamp}}}'
            f',"decided_at_ms":{now_ms}}}'.encode()
        )
    return encoded
