"""What a policy would have decided over history, beside another policy, on the same scores.

Features are the offline ones, which equal the online ones, so the past is judged as
it would have been: with the labels that were known by then, and not one more.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from apps.arguments import write_json
from apps.fraud.decision import DECISIONS, Policy, Verdicts, decide, load_policy
from apps.fraud.features import DAY_MS
from apps.fraud.offline import HistoryIndex, offline_context
from apps.fraud.scoring import Scorer
from apps.fraud.table import LABEL_COLUMN
from apps.fraud.transaction import Transaction, TransactionSchema
from cluster.client import Client, HttpClient, api_key_from_environment
from cluster.errors import ConfigurationError

_BATCH = 512  # transactions per request
_NUM_EXAMPLES = 10  # of decisions that differ


class Scored(NamedTuple):
    """The rows that are decided again: transactions, features [N, 24], outputs [N, 28], labels."""

    transactions: list[Transaction]
    context: NDArray[np.float64]
    outputs: NDArray[np.float32]
    frauds: NDArray[np.bool_]


async def score_history(
    table: pd.DataFrame, days: int, client: Client, progress: Callable[[str], object]
) -> Scored:
    """Score the last days of a canonical table with labels."""
    first_ms = table["time_ms"].iloc[-1] - days * DAY_MS
    rows = np.flatnonzero((table["time_ms"] > first_ms).to_numpy())
    context, index, scorer = offline_context(table), HistoryIndex(table), Scorer(client)
    outputs = []
    for start in range(0, rows.size, _BATCH):
        batch = rows[start : start + _BATCH]
        scores = await scorer.score(index.features(batch, context), f"backtest-{start}")
        outputs.append(scores.outputs)
        progress(f"\rscored {start + batch.size} of {rows.size} transactions")
    chosen = table.iloc[rows]
    columns = ("transaction_id", "time_ms", "card", "terminal", "amount_minor")
    transactions = [
        Transaction(*values)
        for values in zip(*(chosen[column].tolist() for column in columns), strict=True)
    ]
    frauds = chosen[LABEL_COLUMN].to_numpy() == 1
    return Scored(transactions, context[rows], np.concatenate(outputs), frauds)


def judge(policy: Policy, scored: Scored) -> tuple[Verdicts, dict[str, Any]]:
    """Return what a policy decides, and its confusion matrix in transactions and money."""
    verdicts = decide(policy, scored.transactions, scored.context, scored.outputs)
    minor = np.array([t.amount_minor for t in scored.transactions], np.int64)
    matrix = {
        decision: {
            kind: {"transactions": int(rows.sum()), "amount_minor": int(minor[rows].sum())}
            for kind, is_fraud in (("fraud", scored.frauds), ("genuine", ~scored.frauds))
            for rows in [(verdicts.codes == code) & is_fraud]
        }
        for code, decision in enumerate(DECISIONS)
    }
    flagged = verdicts.codes > 0
    caught = int((flagged & scored.frauds).sum())
    return verdicts, {
        "version": policy.version,
        "matrix": matrix,
        "recall": caught / max(1, int(scored.frauds.sum())),
        "precision": caught / max(1, int(flagged.sum())),
    }


def compare(policy: Policy, baseline: Policy, scored: Scored) -> dict[str, Any]:
    """Return both confusion matrices, and how many decisions differ, with examples."""
    ours, figures = judge(policy, scored)
    theirs, baseline_figures = judge(baseline, scored)
    changed = np.flatnonzero(ours.codes != theirs.codes)
    examples = [
        {
            "transaction_id": scored.transactions[i].transaction_id,
            "fraud": bool(scored.frauds[i]),
            "score": float(ours.scores[i]),
            "baseline": DECISIONS[theirs.codes[i]],
            "policy": DECISIONS[ours.codes[i]],
            "reasons": list(ours.reasons[i]),
        }
        for i in changed[:_NUM_EXAMPLES].tolist()
    ]
    return {
        "transactions": len(scored.transactions),
        "frauds": int(scored.frauds.sum()),
        "policy": figures,
        "baseline": baseline_figures,
        "changed": int(changed.size),
        "examples": examples,
    }


def main(args: argparse.Namespace) -> int:
    """Run ``trimoe fraud backtest``."""
    policy, baseline = load_policy(args.policy), load_policy(args.baseline)
    table = TransactionSchema().read_table(args.data)
    if LABEL_COLUMN not in table:
        message = f"{args.data}: expected a column {LABEL_COLUMN} to judge decisions by"
        raise ConfigurationError(message)
    client = HttpClient(args.url, api_key=api_key_from_environment())
    scored = asyncio.run(score_history(table, args.days, client, sys.stderr.write))
    figures = compare(policy, baseline, scored)
    for name in ("baseline", "policy"):
        sys.stdout.write(
            f"{name} {figures[name]['version']}: recall {figures[name]['recall']:.3f}, "
            f"precision {figures[name]['precision']:.3f}\n"
        )
    sys.stdout.write(f"{figures['changed']} of {figures['transactions']} decisions differ\n")
    write_json(args.json, figures)
    return 0
