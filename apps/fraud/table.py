"""Transactions as a pandas table: read from and written to CSV and parquet.

Canonical columns, rows in the order (time_ms, transaction_id), ids unique:

    transaction_id   int64 or str
    time_ms          int64, epoch milliseconds UTC
    card, terminal   categories of str
    amount_minor     int64, whole minor units
    TX_FRAUD         int8, only if the file has labels
    TX_FRAUD_SCENARIO  int8, only from the simulator; it explains the label and is never a feature
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.fraud.features import Events, Ints
from apps.fraud.transaction import (
    DECIMAL_TOLERANCE,
    MAX_AMOUNT_MINOR,
    MAX_ID_CHARACTERS,
    MAX_TIME_MS,
    DecodeError,
    ErrorClass,
    TransactionSchema,
)

LABEL_COLUMN = "TX_FRAUD"
SCENARIO_COLUMN = "TX_FRAUD_SCENARIO"


def read_table(path: Path, schema: TransactionSchema) -> pd.DataFrame:
    """Return the canonical table of a file; ``.csv`` is CSV, all else parquet.

    Columns that the schema does not name are ignored, except the labels.

    Raises:
        DecodeError: A column is missing, or a value is not what the schema declares.
        OSError: The file cannot be read.
    """
    raw = _read_columns(path, schema)
    if missing := schema.fields - set(raw.columns):
        raise DecodeError("MissingField", f"{path}: expected the columns {sorted(missing)}")
    table = pd.DataFrame(
        {
            "transaction_id": _ids(raw[schema.transaction_id], schema),
            "time_ms": _times(raw[schema.time], schema),
            "card": _names(raw[schema.card]),
            "terminal": _names(raw[schema.terminal]),
            "amount_minor": _amounts(raw[schema.amount], schema),
        }
    )
    if LABEL_COLUMN in raw:
        _require(raw[LABEL_COLUMN].isin((0, 1)), "InvalidLabel", raw[LABEL_COLUMN], "0 or 1")
        table[LABEL_COLUMN] = raw[LABEL_COLUMN].astype(np.int8)
    unique = ~table["transaction_id"].duplicated()
    _require(unique, "InvalidId", raw[schema.transaction_id], "every id once")
    return table.sort_values(["time_ms", "transaction_id"], ignore_index=True)


def write_table(table: pd.DataFrame, path: Path, schema: TransactionSchema) -> None:
    """Write a canonical table under the schema's names, with its label columns if it has them."""
    raw = pd.DataFrame(
        {
            schema.transaction_id: table["transaction_id"],
            schema.time: _written_times(table["time_ms"], schema),
            schema.card: table["card"].astype(str),
            schema.terminal: table["terminal"].astype(str),
            schema.amount: table["amount_minor"] / schema.minor_units,
        }
    )
    for name in (LABEL_COLUMN, SCENARIO_COLUMN):
        if name in table:
            raw[name] = table[name]
    if path.suffix == ".csv":
        raw.to_csv(path, index=False)
    else:
        raw.to_parquet(path, index=False)


def id_ranks(table: pd.DataFrame) -> Ints:
    """Return integers [N] that order like the transaction ids."""
    ids = table["transaction_id"]
    if pd.api.types.is_integer_dtype(ids):
        return ids.to_numpy(np.int64)
    return pd.factorize(ids.to_numpy(object), sort=True)[0].astype(np.int64)


def event_columns(table: pd.DataFrame) -> tuple[Events, list[str], list[str]]:
    """Return a canonical table as numbers, and the names behind card and terminal numbers.

    The ratios are left to ``apps.fraud.offline.with_ratios``.
    """
    card, cards = pd.factorize(table["card"])
    terminal, terminals = pd.factorize(table["terminal"])
    label = np.zeros(len(table), np.int8)
    if LABEL_COLUMN in table:
        label = table[LABEL_COLUMN].to_numpy(np.int8)
    events = Events(
        table["time_ms"].to_numpy(np.int64),
        table["amount_minor"].to_numpy(np.int64),
        card.astype(np.int32),
        terminal.astype(np.int32),
        label,
        np.full(len(table), np.nan, np.float32),
    )
    return events, [str(name) for name in cards], [str(name) for name in terminals]


def _read_columns(path: Path, schema: TransactionSchema) -> pd.DataFrame:
    wanted = schema.fields | {LABEL_COLUMN}
    if path.suffix == ".csv":
        names = dict.fromkeys((schema.card, schema.terminal), str)
        if schema.id_kind == "string":
            names[schema.transaction_id] = str
        return pd.read_csv(path, usecols=lambda name: name in wanted, dtype=names)
    raw = pd.read_parquet(path)
    return raw[[name for name in raw.columns if name in wanted]]


def _require(
    valid: "pd.Series[bool]", error_class: ErrorClass, values: "pd.Series[Any]", expected: str
) -> None:
    if not valid.all():
        row = int(np.argmin(valid.to_numpy(bool)))
        message = (
            f"column {values.name}: expected {expected}, got {values.iloc[row]!r:.80} in row {row} "
            f"and {int((~valid).sum()) - 1} more"
        )
        raise DecodeError(error_class, message)


def _ids(values: "pd.Series[Any]", schema: TransactionSchema) -> "pd.Series[Any]":
    if schema.id_kind == "string":
        return _checked_names(values).astype(object)
    whole = pd.Series(pd.api.types.is_integer_dtype(values), index=values.index)
    _require(whole, "InvalidId", values, "64-bit integers (or declare the id kind string)")
    return values.astype(np.int64)


def _checked_names(values: "pd.Series[Any]") -> "pd.Series[Any]":
    names = values.astype(str).fillna("")
    floating = pd.api.types.is_float_dtype(values)  # 596.0 is no name of 596
    printable = names.map(str.isprintable).astype(bool)
    valid = values.notna() & names.str.len().between(1, MAX_ID_CHARACTERS) & printable
    expected = f"1 to {MAX_ID_CHARACTERS} printable characters or an integer"
    _require(valid & (not floating), "InvalidId", values, expected)
    return names


def _names(values: "pd.Series[Any]") -> pd.Categorical:
    codes, distinct = pd.factorize(values, use_na_sentinel=False)
    names = _checked_names(pd.Series(distinct, name=values.name))
    return pd.Categorical.from_codes(codes, pd.Index(names.astype(object)))


def _times(values: "pd.Series[Any]", schema: TransactionSchema) -> "pd.Series[Any]":
    if schema.time_format == "iso":
        parsed = pd.to_datetime(values, utc=True, errors="coerce", format="ISO8601")
        moments = parsed.astype("datetime64[ms, UTC]")
    else:
        unit = "s" if schema.time_format == "epoch_s" else "ms"
        milliseconds = pd.to_numeric(values, errors="coerce") * (1000 if unit == "s" else 1)
        moments = pd.to_datetime(milliseconds.round(), unit="ms", utc=True, errors="coerce")
    time_ms = moments.astype("datetime64[ms, UTC]").astype(np.int64)
    valid = moments.notna() & time_ms.between(0, MAX_TIME_MS)
    _require(valid, "InvalidTime", values, f"{schema.time_format} from 1970 to 9999")
    return time_ms


def _written_times(time_ms: "pd.Series[Any]", schema: TransactionSchema) -> "pd.Series[Any]":
    if schema.time_format == "iso":
        return pd.to_datetime(time_ms, unit="ms")
    return time_ms / 1000 if schema.time_format == "epoch_s" else time_ms


def _amounts(values: "pd.Series[Any]", schema: TransactionSchema) -> "pd.Series[Any]":
    boolean = pd.api.types.is_bool_dtype(values)
    amount = pd.to_numeric(values, errors="coerce").astype(np.float64)
    scaled = amount * schema.minor_units
    minor = scaled.round()
    exact = ((scaled - minor).abs() <= DECIMAL_TOLERANCE) | (minor / schema.minor_units == amount)
    valid = exact & minor.between(0, MAX_AMOUNT_MINOR) & (not boolean)
    _require(valid, "InvalidAmount", values, f"an amount in whole 1/{schema.minor_units}")
    return minor.astype(np.int64)
