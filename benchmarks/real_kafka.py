"""Apache Kafka itself, one broker in KRaft mode on 127.0.0.1, for tests and benchmarks.

Knows Java, Maven and Kafka's server settings.  The jars named in ``pom.xml`` are
resolved once into ``.work/kafka/<digest of pom.xml>``; data lives in a temporary
folder and goes with the broker.

Not covered: TLS, SASL, several brokers.
"""

import base64
import hashlib
import re
import shutil
import signal
import subprocess
import uuid
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from apps.fraud.brokers import broker_process, free_ports
from cluster.errors import ConfigurationError

_ROOT = Path(__file__).resolve().parents[1]
_POM = _ROOT / "pom.xml"
_MIN_JAVA = 17  # of Kafka 4
_START_TIMEOUT_S = 90.0  # 4 s on two idle cores
_JAVA_OPTIONS = (
    "-Xms512m",
    "-Xmx512m",
    "-Xmn320m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",  # a heap this small on two cores
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)
_SETTINGS = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder}/data
log.message.timestamp.type=CreateTime
log.cleaner.enable=false
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""


def missing_tools() -> list[str]:
    """Return which of the programs that Apache Kafka needs are not here."""
    maven = [] if shutil.which("mvn") else ["Maven"]
    return maven if _java_version() >= _MIN_JAVA else [f"Java {_MIN_JAVA}", *maven]


def _java_version() -> int:
    java = shutil.which("java")
    if java is None:
        return 0
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)  # noqa: S603 - no input
    found = re.search(r'version "(\d+)', done.stderr)
    return int(found.group(1)) if found else 0


class RealKafka:
    """A running Apache Kafka as a context manager; topics are created explicitly only.

    Args:
        settings: Lines for ``server.properties`` on top of ours, by name.

    Attributes:
        bootstrap_servers: Its address while the block runs.
        pid: Its process.

    Raises:
        ConfigurationError: On entry: Java or Maven is missing, or the broker does not start.
    """

    bootstrap_servers: str
    pid: int

    def __init__(self, **settings: str) -> None:
        self._settings = {name.replace("_", "."): value for name, value in settings.items()}

    def __enter__(self) -> Self:
        jars = kafka_jars()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-kafka-")))
            port, controller_port = free_ports(2)
            settings = folder / "server.properties"
            settings.write_text(
                _SETTINGS.format(port=port, controller_port=controller_port, folder=folder)
                + "".join(f"{name}={value}\n" for name, value in self._settings.items())
            )
            java = ["java", *_JAVA_OPTIONS, "-cp", f"{jars}/*"]
            cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            _run(
                [
                    *java,
                    "kafka.tools.StorageTool",
                    "format",
                    f"--cluster-id={cluster_id}",
                    "-c",
                    str(settings),
                ]
            )
            process = stack.enter_context(
                broker_process(
                    [*java, "kafka.Kafka", str(settings)],
                    port,
                    folder / "log",
                    stop_signal=signal.SIGTERM,
                    timeout_s=_START_TIMEOUT_S,
                )
            )
            self.bootstrap_servers = f"127.0.0.1:{port}"
            self.pid = process.pid
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def kafka_jars() -> Path:
    """Return the folder of Kafka's jars, resolved by Maven on first use.

    Raises:
        ConfigurationError: Java or Maven is missing, or Maven cannot resolve the jars.
    """
    if missing := missing_tools():
        message = (
            f"Apache Kafka needs Java {_MIN_JAVA} and Maven; missing here: {', '.join(missing)}"
        )
        raise ConfigurationError(message)
    jars = _ROOT / ".work" / "kafka" / hashlib.sha256(_POM.read_bytes()).hexdigest()[:16]
    if not jars.is_dir():
        jars.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=jars.parent) as scratch:
            maven = ["mvn", "--quiet", "--batch-mode", "--file", str(_POM)]
            copy = ["dependency:copy-dependencies", "-DincludeScope=runtime"]
            _run([*maven, *copy, f"-DoutputDirectory={scratch}/jars"])
            Path(scratch, "jars").rename(jars)
    return jars


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        message = f"{' '.join(command[:1])} ended with status {done.returncode}: {''.join(last)}"
        raise ConfigurationError(message)
