import pytest

from apps.fraud.labels import Label, LabelSchema
from apps.fraud.transaction import DecodeError

SCHEMA = LabelSchema()


@pytest.mark.parametrize(
    ("verdict", "is_fraud"), [("1", True), ("0", False), ("true", True), ("false", False)]
)
def test_decodes_the_handbook_names(verdict: str, is_fraud: bool) -> None:
    value = f'{{"TRANSACTION_ID": 7, "TX_FRAUD": {verdict}}}'.encode()
    assert SCHEMA.decode(value) == Label(7, is_fraud)


def test_field_names_are_configurable() -> None:
    schema = LabelSchema("id", "bad", "string")
    assert schema.decode(b'{"id": "a-1", "bad": 1}') == Label("a-1", is_fraud=True)


@pytest.mark.parametrize(
    ("value", "error_class"),
    [
        (None, "MalformedMessage"),
        (b"no", "MalformedMessage"),
        (b'{"TRANSACTION_ID": 7}', "MissingField"),
        (b'{"TRANSACTION_ID": 7, "TX_FRAUD": 1, "BY": "me"}', "UnknownField"),
        (b'{"TRANSACTION_ID": 7, "TX_FRAUD": 2}', "InvalidLabel"),
        (b'{"TRANSACTION_ID": 7, "TX_FRAUD": 1.0}', "InvalidLabel"),
        (b'{"TRANSACTION_ID": 7, "TX_FRAUD": null}', "InvalidLabel"),
        (b'{"TRANSACTION_ID": "7", "TX_FRAUD": 1}', "InvalidId"),
        (b" " * 65_537, "MessageTooLarge"),
    ],
)
def test_each_bad_message_has_its_error_class(value: bytes | None, error_class: str) -> None:
    with pytest.raises(DecodeError) as error:
        SCHEMA.decode(value)
    assert error.value.error_class == error_class
