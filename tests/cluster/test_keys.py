"""API keys: what is stored, what is recognised, what a file must look like."""

import hashlib
import json
import logging
import stat
from pathlib import Path
from typing import Any

import pytest

from cluster.caller import Caller, Rate, Role
from cluster.errors import AccessDeniedError, ConfigurationError
from cluster.keys import RELOAD_PERIOD_S, KeyFile, create_key, load_keys

GOOD = {"tenant": "risk", "key_sha256": "ab" * 32}


def write(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_a_new_key_is_recognised_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    token = create_key(path, "risk", tasks=["fraud"], rate=Rate(5.0, 50.0))
    caller = load_keys(path).find(token.encode())
    assert caller is not None
    assert (caller.tenant, caller.rate) == ("risk", Rate(5.0, 50.0))
    assert caller.tasks == frozenset({"fraud"})
    assert caller.roles == frozenset({Role.INFER, Role.JOBS})
    text = path.read_text()
    assert token not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    assert caller.key_id in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_tokens_are_long_and_never_the_same(tmp_path: Path) -> None:
    tokens = {create_key(tmp_path / "keys.json", "risk") for _ in range(20)}
    assert len(tokens) == 20
    assert min(map(len, tokens)) >= 43  # 256 bits


def test_every_key_of_a_file_is_found_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    tokens = {name: create_key(path, name) for name in ("first", "middle", "last")}
    ring = load_keys(path)
    for name, token in tokens.items():
        caller = ring.find(token.encode())
        assert caller is not None
        assert caller.tenant == name
        for wrong in (token[:-1], token + "x", token.upper(), "", "\u00e9"):
            assert ring.find(wrong.encode()) is None


def test_another_key_of_a_tenant_keeps_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "risk", rate=Rate(5.0, 50.0))
    token = create_key(path, "risk")
    caller = load_keys(path).find(token.encode())
    assert caller is not None
    assert caller.rate == Rate(5.0, 50.0)
    with pytest.raises(ConfigurationError, match="expected one rate for tenant 'risk'"):
        create_key(path, "risk", rate=Rate(6.0, 50.0))
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "entries",
    [
        {"keys": []},
        ["risk"],
        [{"tenant": "risk"}],
        [{**GOOD, "key_sha256": "abc"}],
        [{**GOOD, "key_sha256": "ab" * 31}],
        [{**GOOD, "key_sha256": 5}],
        [{**GOOD, "tenant": "../etc"}],
        [{**GOOD, "tenant": None}],
        [{**GOOD, "key": "x"}],
        [{**GOOD, "roles": ["root"]}],
        [{**GOOD, "tasks": "fraud"}],
        [{**GOOD, "tasks": [1]}],
        [{**GOOD, "rate": {"requests_per_s": 0}}],
        [{**GOOD, "rate": {"requests_per_s": True}}],
        [{**GOOD, "rate": {"per_day": 5}}],
        [{**GOOD, "rate": 5}],
        [GOOD, GOOD],
    ],
    ids=str,
)
def test_a_file_that_is_not_one_of_keys_is_named(tmp_path: Path, entries: object) -> None:
    path = write(tmp_path / "keys.json", entries)
    with pytest.raises(ConfigurationError, match=r"keys\.json: expected ") as caught:
        load_keys(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[{", "\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match="make one with trimoe keys create"):
        load_keys(path)
    with pytest.raises(ConfigurationError, match="FileNotFoundError"):
        load_keys(tmp_path / "none.json")


def test_a_token_put_where_its_hash_belongs_is_not_repeated(tmp_path: Path) -> None:
    token = "trimoe_" + "s" * 43
    path = write(tmp_path / "keys.json", [{**GOOD, "key_sha256": token}])
    with pytest.raises(ConfigurationError) as caught:
        load_keys(path)
    assert "sss" not in str(caught.value)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_taken_out_of_the_file_is_withdrawn_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    clock = Clock()
    kept, withdrawn = create_key(path, "kept"), create_key(path, "withdrawn")
    keys = KeyFile(path, clock)
    write(path, json.loads(path.read_text())[:1])
    assert keys.find(withdrawn.encode()) is not None
    clock.now += RELOAD_PERIOD_S
    assert keys.find(withdrawn.encode()) is None
    assert keys.find(kept.encode()) is not None


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_file_that_became_unreadable_leaves_the_keys_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    clock = Clock()
    token = create_key(path, "risk")
    keys = KeyFile(path, clock)
    path.unlink() if damage == "gone" else path.write_text("[")
    for _ in range(3):
        clock.now += RELOAD_PERIOD_S
        assert keys.find(token.encode()) is not None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "keys stay as they were" in record.message


def test_a_caller_may_do_what_its_key_says_and_no_more() -> None:
    caller = Caller("k", "risk", frozenset({Role.INFER}), frozenset({"fraud"}))
    caller.require(Role.INFER)
    caller.require_task("fraud")
    assert caller.speak_for(None) == caller.speak_for("risk") == "risk"
    refused: list[Any] = [
        lambda: caller.require(Role.JOBS),
        lambda: caller.require_task("maintenance"),
        lambda: caller.speak_for("plant"),
    ]
    for attempt in refused:
        with pytest.raises(AccessDeniedError, match=r"expected .* got "):
            attempt()
