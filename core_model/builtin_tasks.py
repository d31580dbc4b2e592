"""The tasks this distribution ships, as entry points of ``trimoe.tasks``."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core_model.tasks import ExtraSpec, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from core_model.config import MoEConfig

CONTEXT_COLUMNS = (  # handbook features (15) and online features (9), see apps/fraud/features.py
    "TX_AMOUNT",
    "TX_DURING_WEEKEND",
    "TX_DURING_NIGHT",
    "CUSTOMER_ID_NB_TX_1DAY_WINDOW",
    "CUSTOMER_ID_AVG_AMOUNT_1DAY_WINDOW",
    "CUSTOMER_ID_NB_TX_7DAY_WINDOW",
    "CUSTOMER_ID_AVG_AMOUNT_7DAY_WINDOW",
    "CUSTOMER_ID_NB_TX_30DAY_WINDOW",
    "CUSTOMER_ID_AVG_AMOUNT_30DAY_WINDOW",
    "TERMINAL_ID_NB_TX_1DAY_WINDOW",
    "TERMINAL_ID_RISK_1DAY_WINDOW",
    "TERMINAL_ID_NB_TX_7DAY_WINDOW",
    "TERMINAL_ID_RISK_7DAY_WINDOW",
    "TERMINAL_ID_NB_TX_30DAY_WINDOW",
    "TERMINAL_ID_RISK_30DAY_WINDOW",
    "C_GAP",
    "T_GAP",
    "CT_SEEN",
    "C_RATIO_ALL",
    "C_RATIO30",
    "C_PREV_MAX",
    "C_OVERMAX",
    "C_Z",
    "T_DAYS_SINCE_KNOWN_FRAUD",
)
NUM_CONTEXT = len(CONTEXT_COLUMNS)
COLUMN_KIND = 0  # 0 the event itself, 1 history of its card, 2 history of its terminal
COLUMN_AGE_S = 1  # seconds before the event
COLUMN_AMOUNT = 2  # currency units
COLUMN_MATURED = 3  # 1 if old enough for its label to be known
COLUMN_FRAUD = 4  # 1 if matured and known as fraud
COLUMN_SAME = 5  # 1 if card and terminal are both those of the event
COLUMN_RATIO = 6  # amount over the mean of its card's earlier amounts, NaN if undefined
ROW_COLUMNS = ("kind", "age_s", "amount", "matured", "fraud", "same", "ratio")
NUM_ROW_COLUMNS = len(ROW_COLUMNS)
NUM_CARD_ROWS = 16  # last transactions of the card before this one
NUM_TERMINAL_ROWS = 32  # last transactions of the terminal before this one
TOKENS_PER_TRANSACTION = 3  # sequence alone, sequence beside the tree, tree


def _count_tokens(num_rows: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.full(num_rows.shape, TOKENS_PER_TRANSACTION, dtype=np.int64)


def _build_adapter(config: "MoEConfig") -> "nn.Module":
    from core_model.tabular import TabularAdapter  # noqa: PLC0415 - torch stays out of the registry

    return TabularAdapter(config)


def _build_head(config: "MoEConfig") -> "nn.Module":
    from core_model.tabular import TabularHead  # noqa: PLC0415 - torch stays out of the registry

    return TabularHead(config)


FRAUD = TaskSpec(
    name="fraud",
    d_task=NUM_ROW_COLUMNS,
    outputs=(
        "logit",
        "tree_logit",
        "sequence_logit",
        "gate",
        *(f"contribution_{i}" for i in range(NUM_CONTEXT)),
    ),
    build_adapter=_build_adapter,
    build_head=_build_head,
    count_tokens=_count_tokens,
    max_rows=1 + NUM_CARD_ROWS + NUM_TERMINAL_ROWS,
    max_tokens=TOKENS_PER_TRANSACTION,
    service_class="stream",
    deadline_ms=1000.0,
    extras={"context": ExtraSpec(width=NUM_CONTEXT, columns=CONTEXT_COLUMNS)},
    columns=ROW_COLUMNS,
)
