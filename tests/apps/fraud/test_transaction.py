import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.fraud.table import write_table
from apps.fraud.transaction import (
    MAX_AMOUNT_MINOR,
    DecodeError,
    TimeFormat,
    Transaction,
    TransactionSchema,
)

GOOD: dict[str, Any] = {
    "TRANSACTION_ID": 7,
    "TX_DATETIME": "2018-04-01 00:00:31",
    "CUSTOMER_ID": 596,
    "TERMINAL_ID": "T3156",
    "TX_AMOUNT": 57.16,
}
SCHEMA = TransactionSchema()
APRIL_MS = 1_522_540_800_000  # 2018-04-01 00:00 UTC


def message(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_decodes_the_handbook_names() -> None:
    assert SCHEMA.decode(message()) == Transaction(7, APRIL_MS + 31_000, "596", "T3156", 5716)


@pytest.mark.parametrize(
    ("time", "ms"),
    [
        ("2018-04-01T00:00:00", 0),
        ("2018-04-01T00:00:00Z", 0),
        ("2018-04-01T02:00:00.250+02:00", 250),
        ("2018-04-01", 0),
    ],
)
def test_iso_times_without_a_zone_are_utc(time: str, ms: int) -> None:
    assert SCHEMA.decode(message(TX_DATETIME=time)).time_ms == APRIL_MS + ms


@pytest.mark.parametrize(
    ("time_format", "time", "ms"),
    [("epoch_s", 12, 12_000), ("epoch_s", 12.5, 12_500), ("epoch_ms", 12, 12)],
)
def test_epoch_times_are_read_as_declared(time_format: TimeFormat, time: float, ms: int) -> None:
    schema = TransactionSchema(time_format=time_format)
    assert schema.decode(message(TX_DATETIME=time)).time_ms == ms


def test_field_names_and_minor_units_are_configurable() -> None:
    schema = TransactionSchema("id", "at", "pan", "shop", "yen", "string", "epoch_ms", 1)
    value = b'{"id": "a-1", "at": 5, "pan": "p", "shop": "s", "yen": 120}'
    assert schema.decode(value) == Transaction("a-1", 5, "p", "s", 120)


@pytest.mark.parametrize(
    ("changes", "error_class"),
    [
        ({"TX_AMOUNT": -0.01}, "InvalidAmount"),
        ({"TX_AMOUNT": float("nan")}, "InvalidAmount"),
        ({"TX_AMOUNT": float("inf")}, "InvalidAmount"),
        ({"TX_AMOUNT": True}, "InvalidAmount"),
        ({"TX_AMOUNT": "57.16"}, "InvalidAmount"),
        ({"TX_AMOUNT": None}, "InvalidAmount"),
        ({"TX_AMOUNT": 1.234}, "InvalidAmount"),
        ({"TX_AMOUNT": 10**30}, "InvalidAmount"),
        ({"TX_AMOUNT": 1e30}, "InvalidAmount"),
        ({"TX_DATETIME": 31}, "InvalidTime"),
        ({"TX_DATETIME": "yesterday"}, "InvalidTime"),
        ({"TX_DATETIME": "1969-12-31 23:59:59"}, "InvalidTime"),
        ({"TX_DATETIME": None}, "InvalidTime"),
        ({"TRANSACTION_ID": "7"}, "InvalidId"),
        ({"TRANSACTION_ID": True}, "InvalidId"),
        ({"TRANSACTION_ID": 2**63}, "InvalidId"),
        ({"TRANSACTION_ID": 7.0}, "InvalidId"),
        ({"CUSTOMER_ID": ""}, "InvalidId"),
        ({"CUSTOMER_ID": "a\x00b"}, "InvalidId"),
        ({"CUSTOMER_ID": [1]}, "InvalidId"),
        ({"TERMINAL_ID": "x" * 129}, "InvalidId"),
        ({"TERMINAL_ID": None}, "InvalidId"),
        ({"NOTE": "hello"}, "UnknownField"),
        ({"TX_FRAUD": 0}, "UnknownField"),
    ],
)
def test_each_bad_field_has_its_error_class(changes: dict[str, object], error_class: str) -> None:
    with pytest.raises(DecodeError) as error:
        SCHEMA.decode(message(**changes))
    assert error.value.error_class == error_class
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "error_class"),
    [
        (None, "MalformedMessage"),
        (b"", "MalformedMessage"),
        (b"\xff\xfe", "MalformedMessage"),
        (b"[1]", "MalformedMessage"),
        (b"{", "MalformedMessage"),
        (b"[" * 30_000, "MalformedMessage"),
        (b'{"TX_AMOUNT": 1, "TX_AMOUNT": 2}', "MalformedMessage"),
        (b'{"TX_AMOUNT": ' + b"9" * 5000 + b"}", "MalformedMessage"),
        (b" " * 65_537, "MessageTooLarge"),
        (b"{}", "MissingField"),
    ],
)
def test_what_is_no_object_is_malformed(value: bytes | None, error_class: str) -> None:
    with pytest.raises(DecodeError) as error:
        SCHEMA.decode(value)
    assert error.value.error_class == error_class


def test_ignoring_extra_fields_still_rejects_labels() -> None:
    schema = TransactionSchema(extra_fields="ignore")
    assert schema.decode(message(NOTE="hello")) == SCHEMA.decode(message())
    with pytest.raises(DecodeError, match="TX_FRAUD_SCENARIO"):
        schema.decode(message(NOTE="hello", TX_FRAUD_SCENARIO=2))


@given(st.integers(0, MAX_AMOUNT_MINOR))
def test_every_amount_in_cents_survives_json(minor: int) -> None:
    assert SCHEMA.decode(message(TX_AMOUNT=minor / 100)).amount_minor == minor


def test_binary_noise_is_no_third_decimal() -> None:
    assert SCHEMA.decode(message(TX_AMOUNT=33.45 * 5)).amount_minor == 16_725


@settings(max_examples=50)
@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(
        lambda value: json.dumps({**GOOD, "TX_AMOUNT": value}).encode()
    )
)
def test_any_bytes_decode_or_raise_decode_error(value: bytes) -> None:
    try:
        transaction = SCHEMA.decode(value)
    except DecodeError:
        return
    assert 0 <= transaction.amount_minor <= MAX_AMOUNT_MINOR


def raw_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "TRANSACTION_ID": [3, 1, 2],
            "TX_DATETIME": pd.to_datetime(
                ["2018-04-02 00:00:00", "2018-04-01 00:00:31", "2018-04-02 00:00:00"]
            ),
            "CUSTOMER_ID": [5, 596, 596],
            "TERMINAL_ID": [1, 2, 1],
            "TX_AMOUNT": [167.25000000000003, 57.16, 0.0],
            "TX_TIME_DAYS": [1, 0, 1],
            "TX_FRAUD": [0, 1, 0],
        }
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_reads_as_its_messages_would(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    raw = raw_table()
    raw.to_csv(path, index=False) if suffix == ".csv" else raw.to_parquet(path)
    table = SCHEMA.read_table(path)
    assert table["transaction_id"].tolist() == [1, 2, 3]  # by time, then id
    assert table["time_ms"].tolist() == [APRIL_MS + 31_000, *[APRIL_MS + 86_400_000] * 2]
    assert table["card"].tolist() == ["596", "596", "5"]
    assert table["amount_minor"].tolist() == [5716, 0, 16_725]
    assert table["TX_FRAUD"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("time_format", ["iso", "epoch_s", "epoch_ms"])
def test_a_written_table_reads_back(tmp_path: Path, suffix: str, time_format: TimeFormat) -> None:
    schema = TransactionSchema(time_format=time_format, id_kind="string")
    raw_table().to_parquet(tmp_path / "raw.parquet")
    table = TransactionSchema(id_kind="string").read_table(tmp_path / "raw.parquet")
    path = tmp_path / f"written{suffix}"
    write_table(table, path, schema)
    again = schema.read_table(path)
    for column in table:
        assert again[column].tolist() == table[column].tolist()


@pytest.mark.parametrize(
    ("column", "values", "error_class"),
    [
        ("TX_AMOUNT", [1.0, np.nan, 1.0], "InvalidAmount"),
        ("TX_AMOUNT", [1.0, -1.0, 1.0], "InvalidAmount"),
        ("TX_AMOUNT", [1.0, 1.234, 1.0], "InvalidAmount"),
        ("TX_AMOUNT", [True, False, True], "InvalidAmount"),
        ("TX_DATETIME", ["2018-04-01", "never", "2018-04-01"], "InvalidTime"),
        ("TX_DATETIME", ["2018-04-01", None, "2018-04-01"], "InvalidTime"),
        ("TRANSACTION_ID", [1, 1, 2], "InvalidId"),
        ("TRANSACTION_ID", [1.0, np.nan, 2.0], "InvalidId"),
        ("CUSTOMER_ID", [1.0, 2.0, 3.0], "InvalidId"),
        ("CUSTOMER_ID", ["a", None, "b"], "InvalidId"),
        ("CUSTOMER_ID", ["a", "", "b"], "InvalidId"),
        ("TX_FRAUD", [0, 2, 1], "InvalidLabel"),
    ],
)
def test_a_bad_column_names_itself(
    tmp_path: Path, column: str, values: list[Any], error_class: str
) -> None:
    raw = raw_table()
    raw[column] = values
    raw.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DecodeError, match=column) as error:
        SCHEMA.read_table(tmp_path / "bad.parquet")
    assert error.value.error_class == error_class


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    raw_table().drop(columns="TX_AMOUNT").to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DecodeError, match="TX_AMOUNT"):
        SCHEMA.read_table(tmp_path / "bad.parquet")
