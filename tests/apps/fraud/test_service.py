"""The service over the in-memory log: every input is answered once, whatever it is."""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps.fraud.decision import load_policy
from apps.fraud.features import CONTEXT_NAMES
from apps.fraud.intake import Schemas
from apps.fraud.labels import LabelSchema
from apps.fraud.ledger import DUPLICATE_HEADER
from apps.fraud.memory import MemoryLog, MemoryRecord, MemoryStream
from apps.fraud.recovery import Snapshot, read_snapshot, write_snapshot
from apps.fraud.scoring import Scorer
from apps.fraud.service import FraudService
from apps.fraud.settings import ServiceSettings, Topics
from apps.fraud.stream import Ack, Outgoing, TopicPartition
from apps.fraud.transaction import TransactionSchema
from cluster.errors import ConfigurationError, InvalidRequestError, UnavailableError
from cluster.schemas import InferRequest, InferResponse, Timings

PARTITIONS = 3
NOW_MS = 1_800_000_000_000
SCHEMAS = Schemas(TransactionSchema(time_format="epoch_ms"), LabelSchema())


class AmountClient:
    """Scores by amount alone, so that tests know every answer; can fail on purpose."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.refused_amount = -1.0
        self.broken_amount = -1.0
        self.requests: list[InferRequest] = []

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        amounts = request.extras["context"][:, CONTEXT_NAMES.index("TX_AMOUNT")]
        if (amounts == self.refused_amount).any():
            raise InvalidRequestError("one sequence is refused")
        outputs = np.zeros((amounts.size, 28), np.float32)
        outputs[:, 0] = np.where(amounts == self.broken_amount, np.nan, amounts - 100.0)
        return InferResponse(
            request.request_id,
            outputs,
            np.arange(amounts.size + 1, dtype=np.int32),
            np.zeros(amounts.size, np.uint8),
            "model-1",
            Timings(0.0, 0.0),
            np.zeros((1, 1), np.int64),
        )


def new_log() -> MemoryLog:
    names = Topics()
    topics = (names.transactions, names.labels, names.decisions, names.dead_letters)
    return MemoryLog(dict.fromkeys(topics, PARTITIONS), lambda: NOW_MS)


def payment(identifier: int, amount: float = 10.0, **changes: object) -> bytes:
    fields = {
        "TRANSACTION_ID": identifier,
        "TX_DATETIME": NOW_MS - 1_000_000 + 1000 * identifier,
        "CUSTOMER_ID": f"card{identifier % 7}",
        "TERMINAL_ID": f"terminal{identifier % 5}",
        "TX_AMOUNT": amount,
    }
    return json.dumps(fields | changes).encode()


def send(log: MemoryLog, *values: bytes | None) -> None:
    for k, value in enumerate(values):
        log.append(Outgoing("transactions", k % PARTITIONS, b"card", value, []))  # type: ignore[arg-type]


async def serve(
    services: Iterable[FraudService], until: Callable[[], bool], timeout_s: float = 10.0
) -> None:
    """Run services until a condition holds, then stop them and wait for their end."""
    running = list(services)
    tasks = [asyncio.create_task(service.run()) for service in running]
    async with asyncio.timeout(timeout_s):
        while not until() and not any(task.done() for task in tasks):  # noqa: ASYNC110 - a log
            await asyncio.sleep(0.005)
        for service in running:
            service.request_stop()
        await asyncio.gather(*tasks)


def clock_ms() -> int:
    """Return a time that runs on from the timestamps of the log."""
    return NOW_MS + time.monotonic_ns() // 1_000_000


def new_service(
    log: MemoryLog, client: AmountClient, settings: ServiceSettings | None = None
) -> FraudService:
    settings = replace(settings or ServiceSettings(), reorder_wait_ms=0)
    stream = MemoryStream(log, "g")
    return FraudService(settings, SCHEMAS, load_policy(), Scorer(client), stream, clock_ms)


def run(log: MemoryLog, client: AmountClient, settings: ServiceSettings | None = None) -> None:
    """Serve until everything in the log is answered and committed."""
    asyncio.run(serve([new_service(log, client, settings)], lambda: is_committed(log)))


def is_committed(log: MemoryLog) -> bool:
    return all(
        log.commits.get(("g", TopicPartition("transactions", p)), 0)
        == len(log.records[TopicPartition("transactions", p)])
        for p in range(PARTITIONS)
    )


def decisions(log: MemoryLog) -> list[dict[str, object]]:
    return [json.loads(record.value or b"") for record in log.topic("decisions")]


def dead_letters(log: MemoryLog) -> list[dict[str, object]]:
    return [json.loads(record.value or b"") for record in log.topic("dead-letters")]


def test_every_transaction_is_decided_once_with_its_place_and_versions() -> None:
    """Amounts of 90, 100 and 110 are approved, reviewed and blocked by their scores."""
    log = new_log()
    send(log, payment(1, 90.0), payment(2, 100.0), payment(3, 110.0))
    run(log, AmountClient())
    found = {decision["transaction_id"]: decision for decision in decisions(log)}
    assert [found[i]["decision"] for i in (1, 2, 3)] == ["approve", "review", "block"]
    assert found[2]["score"] == 0.5
    assert found[3]["model_version"] == "model-1"
    assert found[3]["input"] == {
        "topic": "transactions",
        "partition": 2,
        "offset": 0,
        "timestamp": NOW_MS,
    }
    assert dead_letters(log) == []


BAD = {
    "malformed": (b"{not json", "MalformedMessage"),
    "no value": (None, "MalformedMessage"),
    "missing field": (b'{"TRANSACTION_ID": 5}', "MissingField"),
    "NaN amount": (payment(5, float("nan")), "InvalidAmount"),
    "unknown field": (payment(5, COLOUR="red"), "UnknownField"),
    "10 MB": (b"x" * 10_000_000, "MessageTooLarge"),
    "6 minutes ahead": (payment(5, TX_DATETIME=NOW_MS + 360_000), "EventTimeAhead"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_message_is_a_dead_letter_and_its_neighbours_are_decided(name: str) -> None:
    """The dead letter says what, where and why; nothing else is lost."""
    value, error_class = BAD[name]
    log = new_log()
    send(log, payment(1), value, payment(3))
    run(log, AmountClient())
    assert sorted(decision["transaction_id"] for decision in decisions(log)) == [1, 3]  # type: ignore[type-var]
    (letter,) = dead_letters(log)
    assert letter["error_class"] == error_class
    assert letter["input"] == {
        "topic": "transactions",
        "partition": 1,
        "offset": 0,
        "timestamp": NOW_MS,
    }
    assert letter["payload_bytes"] == len(value or b"")
    assert base64.b64decode(str(letter["payload"])) == (value or b"")[:4096]
    assert len(log.topic("dead-letters")[0].value or b"") < 10_000


def test_replay_accepts_times_ahead_of_the_broker() -> None:
    """A replayed topic has timestamps of its own."""
    log = new_log()
    send(log, payment(5, TX_DATETIME=NOW_MS + 360_000))
    run(log, AmountClient(), ServiceSettings(max_ahead_ms=None))
    assert len(decisions(log)) == 1


def test_duplicate_repeats_its_decision_and_does_not_advance_the_state() -> None:
    """Same bytes, marked by a header; the next features do not count it."""
    log = new_log()
    twice, after = payment(7), payment(14)
    send(log, twice, twice, twice)
    run(log, AmountClient())
    records = log.topic("decisions")
    assert len({record.value for record in records}) == 1
    assert Counter(len(record.headers) for record in records) == {0: 1, 1: 2}
    assert {name for record in records for name, _ in record.headers} == {DUPLICATE_HEADER}
    clean = new_log()
    send(log, after)
    send(clean, twice, after)
    run(log, AmountClient())
    run(clean, AmountClient())
    digests = [
        [d["features_digest"] for d in decisions(each) if d["transaction_id"] == 14]
        for each in (log, clean)
    ]
    assert digests[0] == digests[1] != []


def test_non_finite_output_is_a_dead_letter() -> None:
    """The other transactions of the same request are decided."""
    log, client = new_log(), AmountClient()
    client.broken_amount = 13.0
    send(log, payment(1), payment(2, 13.0), payment(3))
    run(log, client)
    assert len(decisions(log)) == 2
    assert [letter["error_class"] for letter in dead_letters(log)] == ["NonFiniteOutput"]


def test_refused_transaction_does_not_take_the_poll_down() -> None:
    """An invalid request is halved until the one at fault is alone."""
    log, client = new_log(), AmountClient()
    client.refused_amount = 13.0
    send(log, *(payment(i, 13.0 if i == 11 else 10.0) for i in range(30)))
    run(log, client)
    assert len(decisions(log)) == 29
    (letter,) = dead_letters(log)
    assert letter["error_class"] == "InvalidRequestError"
    assert json.loads(base64.b64decode(str(letter["payload"])))["TRANSACTION_ID"] == 11


def test_absent_model_delays_and_loses_nothing() -> None:
    """The same request is sent again until it is answered."""
    log, client = new_log(), AmountClient()
    client.failures = [UnavailableError("away"), UnavailableError("away")]
    send(log, payment(1))
    run(log, client)
    assert len(decisions(log)) == 1
    assert len({request.request_id for request in client.requests}) == 1


def test_missing_topic_is_one_clear_line() -> None:
    """Nothing is read when an output has nowhere to go."""
    settings = ServiceSettings(topics=Topics(decisions="no-such-topic"))
    with pytest.raises(ConfigurationError, match="no-such-topic") as raised:
        run(new_log(), AmountClient(), settings)
    assert "\n" not in str(raised.value)


class LossyStream(MemoryStream):
    """Fails the delivery of every third message the first time."""

    count = 0

    def send(self, message: Outgoing) -> Ack:
        self.count += 1
        if self.count % 3 == 0:
            return _Failed()
        return super().send(message)


class _Failed:
    is_done = True
    exception = TimeoutError("not acknowledged")


def test_failed_delivery_is_sent_again_before_the_offset_is_committed() -> None:
    """Offsets follow acknowledgements, never the sending."""
    log = new_log()
    send(log, *(payment(i) for i in range(20)))
    settings = replace(ServiceSettings(), reorder_wait_ms=0)
    stream = LossyStream(log, "g")
    service = FraudService(
        settings, SCHEMAS, load_policy(), Scorer(AmountClient()), stream, clock_ms
    )
    asyncio.run(serve([service], lambda: is_committed(log)))
    assert sorted(d["transaction_id"] for d in decisions(log)) == list(range(20))  # type: ignore[type-var]


def test_workers_share_partitions_and_agree_on_features() -> None:
    """Three workers answer each input once, with the digests one worker finds."""
    logs = [new_log(), new_log()]
    for log in logs:
        send(log, *(payment(i) for i in range(60)))
    run(logs[0], AmountClient())
    workers = [
        new_service(logs[1], AmountClient(), ServiceSettings(index=i, num_workers=3))
        for i in range(3)
    ]
    asyncio.run(serve(workers, lambda: len(logs[1].topic("decisions")) >= 60))
    digests = [{d["transaction_id"]: d["features_digest"] for d in decisions(log)} for log in logs]
    assert digests[0] == digests[1]
    assert len(decisions(logs[1])) == 60


def test_restart_answers_the_rest_with_the_features_of_an_unbroken_run(tmp_path: Path) -> None:
    """After a stop, the snapshot and the log lead to the same digests."""
    settings = ServiceSettings(state_dir=tmp_path, snapshot_period_s=0.01)
    broken, unbroken = new_log(), new_log()
    first, second = [payment(i) for i in range(30)], [payment(i) for i in range(30, 60)]
    send(broken, *first)
    run(broken, AmountClient(), settings)
    snapshots = sorted(tmp_path.glob("worker-0/*.npz"))
    assert 1 <= len(snapshots) <= 2
    assert sum(read_snapshot(snapshots[-1]).positions.values()) == 30
    send(broken, *second)
    run(broken, AmountClient(), settings)
    send(unbroken, *first, *second)
    run(unbroken, AmountClient())
    assert len(decisions(broken)) == 60
    assert digest_of(broken) == digest_of(unbroken)


def test_the_last_snapshot_is_written_also_while_another_one_still_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_slowly(directory: Path, snapshot: Snapshot, sequence: int) -> Path:
        time.sleep(0.1)
        return write_snapshot(directory, snapshot, sequence)

    monkeypatch.setattr("apps.fraud.delivery.write_snapshot", write_slowly)
    log = new_log()
    send(log, *(payment(i) for i in range(30)))
    run(log, AmountClient(), ServiceSettings(state_dir=tmp_path, snapshot_period_s=0.001))
    newest = max(tmp_path.glob("worker-0/*.npz"))
    assert sum(read_snapshot(newest).positions.values()) == 30


def digest_of(log: MemoryLog) -> dict[object, object]:
    return {d["transaction_id"]: d["features_digest"] for d in decisions(log)}


def test_death_before_the_commit_answers_nothing_twice() -> None:
    """The answers that already stand are found in the decisions topic."""
    log = new_log()
    send(log, *(payment(i) for i in range(30)), b"{broken")
    run(log, AmountClient())
    log.commits.clear()  # the worker died before any commit
    send(log, payment(30))
    run(log, AmountClient())
    assert len(decisions(log)) == 31
    assert len(dead_letters(log)) == 1


def test_damaged_snapshots_are_skipped_and_the_log_is_read_again(tmp_path: Path) -> None:
    """State and digests are those of an undamaged run."""
    settings = ServiceSettings(state_dir=tmp_path)
    log, clean = new_log(), new_log()
    first, second = [payment(i) for i in range(30)], [payment(i) for i in range(30, 40)]
    send(log, *first)
    run(log, AmountClient(), settings)
    for path in tmp_path.glob("worker-0/*.npz"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    send(log, *second)
    run(log, AmountClient(), settings)
    send(clean, *first, *second)
    run(clean, AmountClient())
    assert digest_of(log) == digest_of(clean)
    assert len(decisions(log)) == 40


def test_a_rebuild_knows_every_fraud_however_many_labels_the_log_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new node has no snapshot, and reads all labels before the first transaction."""
    found = []
    for limit in (1_000_000, 5):
        monkeypatch.setattr("apps.fraud.state.MAX_PENDING_LABELS", limit)
        log = new_log()
        send(log, *(payment(i) for i in range(40)))
        run(log, AmountClient())
        for i in range(40):
            value = f'{{"TRANSACTION_ID": {i}, "TX_FRAUD": {int(i % 10 == 0)}}}'.encode()
            log.append(Outgoing("labels", i % PARTITIONS, None, value, []))
        later = NOW_MS + 8 * 86_400_000
        send(log, *(payment(i, TX_DATETIME=later + i) for i in range(40, 60)))
        run(log, AmountClient(), ServiceSettings(max_ahead_ms=None))
        found.append(digest_of(log))
    assert found[0] == found[1]
    assert len(found[0]) == 60
    assert "lack their first records" not in caplog.text


def test_bad_label_is_a_dead_letter_and_good_ones_reach_the_state() -> None:
    """Labels are input too; what cannot be read is not lost."""
    log = new_log()
    log.append(Outgoing("labels", 0, None, b'{"TRANSACTION_ID": 1, "TX_FRAUD": 7}', []))
    log.append(Outgoing("labels", 1, None, b'{"TRANSACTION_ID": 1, "TX_FRAUD": 1}', []))
    send(log, payment(1), payment(2))
    run(log, AmountClient())
    (letter,) = dead_letters(log)
    assert letter["error_class"] == "InvalidLabel"
    assert MemoryRecord(*log.topic("labels")[0]).topic == letter["input"]["topic"]  # type: ignore[index]
    assert len(decisions(log)) == 2
