"""Which cluster is joined, with which token, and what is said when there is none."""

from pathlib import Path

import pytest

from apps.fraud.brokers import free_ports
from cluster.errors import ConfigurationError
from cluster.membership import choose_address, join, prepare_to_join


def test_an_address_that_is_given_comes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert choose_address("10.0.0.2:6379") == "10.0.0.2:6379"
    assert choose_address("auto") == "10.0.0.1:6379"
    assert choose_address(None) == "10.0.0.1:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert choose_address("auto") == "auto"
    assert choose_address(None) is None


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_nobody_at_the_address_is_one_line_at_once(prefix: str) -> None:
    (port,) = free_ports(1)
    with pytest.raises(ConfigurationError, match=f"{prefix}127.0.0.1:{port}.*refused") as raised:
        join(f"{prefix}127.0.0.1:{port}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["local", "somewhere", "http://127.0.0.1:8265", "host:port"])
def test_an_address_of_no_cluster_names_the_forms_there_are(address: str) -> None:
    with pytest.raises(ConfigurationError, match="expected auto, HOST:PORT or ray://HOST:PORT"):
        join(address)


def test_the_token_of_the_cluster_is_used_and_none_is_made_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another token than that of the nodes would only be refused by them."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for content, mode in ((None, "disabled"), ("secret", "token")):
        if content is not None:
            (tmp_path / ".ray").mkdir()
            (tmp_path / ".ray" / "auth_token").write_text(content)
        environment: dict[str, str] = {}
        monkeypatch.setattr("cluster.membership.os.environ", environment)
        prepare_to_join()
        assert environment["RAY_AUTH_MODE"] == mode
        assert "RAY_AUTH_TOKEN" not in environment
        environment["RAY_AUTH_MODE"] = "given"
        prepare_to_join()
        assert environment["RAY_AUTH_MODE"] == "given"
