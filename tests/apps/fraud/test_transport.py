"""Kafka settings pass through, and nothing else does."""

import json
from pathlib import Path

import pytest

from apps.fraud.transport import KafkaSettings, KafkaStream, read_options
from cluster.errors import ConfigurationError


def test_tls_and_sasl_settings_reach_both_clients() -> None:
    """Values are given the type of kafka-python's default."""
    options = read_options(
        ["security_protocol=SASL_SSL", "ssl_check_hostname=false", "sasl_mechanism=PLAIN",
         "sasl_plain_password=a=b", "request_timeout_ms=1234"]
    )  # fmt: skip
    settings = KafkaSettings("a:1,b:2", options=options)
    for kind in ("consumer", "producer"):
        arguments = settings.for_client(kind)
        assert arguments["ssl_check_hostname"] is False
        assert arguments["sasl_plain_password"] == "a=b"
        assert arguments["request_timeout_ms"] == 1234
        assert arguments["bootstrap_servers"] == ["a:1", "b:2"]


def test_setting_of_one_client_is_kept_from_the_other() -> None:
    """``linger_ms`` is the producer's, ``fetch_min_bytes`` the consumer's."""
    settings = KafkaSettings("a:1", options=read_options(["linger_ms=7", "fetch_min_bytes=9"]))
    assert settings.for_client("producer")["linger_ms"] == 7
    assert "linger_ms" not in settings.for_client("consumer")
    assert settings.for_client("consumer")["fetch_min_bytes"] == 9


def test_file_may_be_json_or_properties_and_pairs_win(tmp_path: Path) -> None:
    """Java's dotted names are read as kafka-python's."""
    properties = tmp_path / "client.properties"
    properties.write_text("# a comment\nsecurity.protocol=SSL\nretry.backoff.ms = 5\n")
    assert read_options([], properties) == {"security_protocol": "SSL", "retry_backoff_ms": 5}
    as_json = tmp_path / "client.json"
    as_json.write_text(json.dumps({"ssl_cafile": "ca.pem", "client_id": "x"}))
    assert read_options(["client_id=y"], as_json) == {"ssl_cafile": "ca.pem", "client_id": "y"}


@pytest.mark.parametrize("pair", ["no_such_setting=1", "acks=1", "linger_ms=soon", "linger_ms"])
def test_unknown_fixed_or_mistyped_setting_is_one_clear_line(pair: str) -> None:
    """The delivery promise cannot be configured away."""
    with pytest.raises(ConfigurationError, match="Kafka setting") as raised:
        read_options([pair])
    assert "\n" not in str(raised.value)


def test_unreachable_broker_is_one_clear_line() -> None:
    """Nothing listens on port 1."""
    settings = KafkaSettings("127.0.0.1:1", options={"bootstrap_timeout_ms": 300})
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:1") as raised:
        KafkaStream(settings)
    assert "\n" not in str(raised.value)
