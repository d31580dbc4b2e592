"""Thresholds, rules and reasons become one decision."""

import json
from pathlib import Path

import numpy as np
import pytest

from apps.fraud.decision import (
    FIRST_CONTRIBUTION,
    Policy,
    Provenance,
    decide,
    encode_decisions,
    load_policy,
)
from apps.fraud.features import CONTEXT_NAMES, NUM_CONTEXT
from apps.fraud.memory import MemoryRecord
from apps.fraud.rules import Rule, parse_rule
from apps.fraud.transaction import Transaction
from cluster.errors import ConfigurationError

LOGITS = (-4.0, 0.0, 4.0)  # probabilities .018, .5, .982


def policy(*rules: Rule) -> Policy:
    return Policy("v7", 0.3, 0.9, 2, 0.1, rules)


def transactions(count: int = 3) -> list[Transaction]:
    return [Transaction(i, 1000 * i, f"card{i}", f"terminal{i}", 100) for i in range(count)]


def outputs(*logits: float) -> np.ndarray:
    out = np.zeros((len(logits), FIRST_CONTRIBUTION + NUM_CONTEXT), np.float32)
    out[:, 0] = logits
    return out


def context(count: int = 3) -> np.ndarray:
    return np.ones((count, NUM_CONTEXT))


def test_thresholds_split_scores_into_approve_review_block() -> None:
    """The score is the sigmoid of the logit; thresholds belong to the stricter side."""
    verdicts = decide(policy(), transactions(), context(), outputs(*LOGITS))
    assert verdicts.codes.tolist() == [0, 1, 2]
    np.testing.assert_allclose(verdicts.scores, 1 / (1 + np.exp(-np.array(LOGITS))))
    exactly = Policy("v", 0.5, 0.5, 2, 0.1)
    assert decide(exactly, transactions(1), context(1), outputs(0.0)).codes.tolist() == [2]


def test_largest_positive_contributions_are_the_reasons() -> None:
    """Small and negative contributions are not named; the largest comes first."""
    out = outputs(0.0)
    out[0, FIRST_CONTRIBUTION : FIRST_CONTRIBUTION + 4] = [0.2, -3.0, 0.9, 0.05]
    reasons = decide(policy(), transactions(1), context(1), out).reasons
    assert reasons == [(f"MODEL_{CONTEXT_NAMES[2]}", f"MODEL_{CONTEXT_NAMES[0]}")]


def test_block_rule_beats_allow_list_beats_review_and_model() -> None:
    """The order of strength does not depend on the order of the rules."""
    deny = Rule("DENIED", "block", field="card", members=frozenset({"card0"}))
    allow = Rule(
        "ALLOWED", "approve", field="terminal", members=frozenset({"terminal0", "terminal2"})
    )
    limit = Rule("LIMIT", "review", feature="TX_AMOUNT", at_least=1.0)
    verdicts = decide(policy(deny, allow, limit), transactions(), context(), outputs(*LOGITS))
    assert verdicts.codes.tolist() == [2, 1, 0]
    assert set(verdicts.reasons[0]) >= {"DENIED", "ALLOWED", "LIMIT"}
    assert verdicts.reasons[1] == ("LIMIT",)


def test_review_rule_never_weakens_a_block() -> None:
    """A hit raises an approval to review and leaves a block alone."""
    limit = Rule("LIMIT", "review", feature="TX_AMOUNT", at_least=1.0)
    verdicts = decide(policy(limit), transactions(), context(), outputs(*LOGITS))
    assert verdicts.codes.tolist() == [1, 1, 2]


def test_undefined_feature_meets_no_rule() -> None:
    """NaN is neither above nor below a limit."""
    gap = Rule("GAP", "block", feature="C_GAP", at_most=60.0)
    undefined = np.full((1, NUM_CONTEXT), np.nan)
    assert decide(policy(gap), transactions(1), undefined, outputs(-4.0)).codes.tolist() == [0]


def test_encoded_decision_is_the_documented_json() -> None:
    """Every field of the contract, ids and names escaped."""
    record = MemoryRecord('to"pic', 3, 17, 1234, b"k", b"v", [])
    given = [Transaction('i"d', 99, "card", "terminal", 100)]
    verdicts = decide(policy(), given, context(1), outputs(0.0))
    (value,) = encode_decisions(verdicts, [record], given, [Provenance("m1", "v7", "ab" * 8)], 5000)
    assert json.loads(value) == {
        "transaction_id": 'i"d',
        "decision": "review",
        "score": 0.5,
        "reasons": [],
        "model_version": "m1",
        "rules_version": "v7",
        "features_digest": "ab" * 8,
        "event_time_ms": 99,
        "input": {"topic": 'to"pic', "partition": 3, "offset": 17, "timestamp": 1234},
        "decided_at_ms": 5000,
    }


def test_shipped_policy_loads_and_names_its_version() -> None:
    """The default needs no file."""
    shipped = load_policy()
    assert shipped.version
    assert {rule.code for rule in shipped.rules} == {"AMOUNT_OVER_LIMIT", "CARD_VELOCITY_1D"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"version": "1"}',
        '{"version": "1", "review_at": 0.9, "block_at": 0.1, "num_reasons": 1, "min_contribution": 0}',
        '{"version": "1", "review_at": 0.1, "block_at": 0.9, "num_reasons": 1, "surprise": 1}',
    ],
)
def test_bad_policy_is_one_clear_error(tmp_path: Path, text: str) -> None:
    """Broken JSON, missing keys, contradicting thresholds, unknown keys."""
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="policy") as raised:
        load_policy(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"then": "review", "feature": "TX_AMOUNT"},
        {"code": "A", "feature": "TX_AMOUNT"},
        {"code": "A", "then": "review"},
        {"code": "A", "then": "review", "feature": "NO_SUCH"},
        {"code": "A", "then": "review", "field": "planet", "in": ["earth"]},
        {"code": "A", "then": "review", "feature": "TX_AMOUNT", "above": 3},
    ],
)
def test_bad_rule_is_one_clear_error(entry: dict[str, object]) -> None:
    """A rule that cannot be meant is refused where it is read."""
    with pytest.raises(ConfigurationError, match="rule"):
        parse_rule(entry)
