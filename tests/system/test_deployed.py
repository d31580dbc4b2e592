"""A cluster as compose.yaml has it, on a real Ray head: deploy, join, decide, stay."""

import gzip
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from apps.fraud.brokers import EmbeddedBroker
from apps.fraud.settings import Topics
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_rig import Collector, make_topics, offline_digests, send_table
from cluster import wire
from cluster.engine import blank_request
from cluster.keys import create_key
from cluster.validation.inventory import shipped
from core_model.tasks import registered_tasks

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
TRIMOE = "import sys; from apps.cli import main; sys.exit(main(sys.argv[1:]))"
RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        body: bytes = answer.read()
        return body


def await_answer(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            get(url)
        except (OSError, urllib.error.URLError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def ready(port: int, head: "Head") -> tuple[str, str]:
    url = f"http://127.0.0.1:{port}/readyz"
    assert json.loads(get(url)) == {"status": "ready"}
    report = json.loads(get(url, Authorization=f"Bearer {head.api_key}"))
    return report["status"], report["model_version"]


def fraud_run(broker: EmbeddedBroker, topics: Topics, *options: str) -> list[str]:
    return [
        *("fraud", "run", "--address=auto", f"--bootstrap-servers={broker.bootstrap_servers}"),
        *(f"--transactions-topic={topics.transactions}", f"--labels-topic={topics.labels}"),
        *(f"--decisions-topic={topics.decisions}", f"--dead-letters-topic={topics.dead_letters}"),
        *options,
    ]


class Spans(ThreadingHTTPServer):
    """Receives OTLP, as a collector would; keeps the trace id and name of every span."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReceiveSpans)
        self.found: set[tuple[str, str]] = set()


class ReceiveSpans(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Spans)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.found |= {(s.trace_id.hex(), s.name) for s in scope.spans}
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def spans() -> Iterator[Spans]:
    with Spans() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@dataclass(frozen=True)
class Head:
    """A running head."""

    dashboard: str
    agent: str
    metrics: str
    environment: Mapping[str, str]
    api_key: str

    def trimoe(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours in the environment of the cluster."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TRIMOE, *words],
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            cwd=ROOT,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, spans: Spans) -> Iterator[Head]:
    """A head with a token, started as compose.yaml does."""
    folder = tmp_path_factory.mktemp("head")
    gcs, dashboard, agent, metrics, client = free_ports(5)
    (folder / "ray_token").write_text(secrets.token_hex(32))
    api_key = create_key(folder / "api_keys.json", "ops")
    environment = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "ray_token"),
        "TRIMOE_API_KEYS": str(folder / "api_keys.json"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{spans.server_address[1]}",
        "OTEL_BSP_SCHEDULE_DELAY": "500",  # ms from one batch of spans to the next
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    options = [f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    options += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    options += [f"--ray-client-server-port={client}", "--object-store-memory=100000000"]
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as session,  # short, for names of sockets
        (folder / "head.log").open("wb") as log,
    ):
        environment_link = Path(session) / "venv"
        environment_link.symlink_to(sys.prefix)  # `ray start` fails below a path with a space
        python = str(environment_link / "bin" / "python")
        command = [python, "-W", "ignore", "-c", RAY, "start", "--head", "--block"]
        process = subprocess.Popen(
            [*command, "--num-cpus=2", f"--temp-dir={session}", *options],
            env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )
        try:
            await_answer(f"http://127.0.0.1:{dashboard}/api/gcs_healthz", 60)
            root = "http://127.0.0.1"
            places = f"{root}:{dashboard}", f"{root}:{agent}", f"{root}:{metrics}"
            yield Head(*places, environment, api_key)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def port(head: Head, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The HTTP port of the shipped CPU config, deployed with our own command."""
    folder = tmp_path_factory.mktemp("config")
    (http,) = free_ports(1)
    config = yaml.safe_load((shipped() / "serve_config.cpu.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": http}
    config["tracing_config"] |= {"enabled": True, "sampling_ratio": 1.0}
    config["applications"][0]["args"]["models"] = str(ROOT / "models")
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    words = ["cluster", "deploy", f"--config={folder / 'serve.yaml'}", "--address", head.dashboard]
    (folder / "wrong").write_text("wrong")
    with EmbeddedBroker() as broker, ThreadPoolExecutor(1) as pool:
        refusing = pool.submit(head.trimoe, *words, RAY_AUTH_TOKEN_PATH=str(folder / "wrong"))
        early = head.trimoe(*fraud_run(broker, make_topics(broker.bootstrap_servers, "early")))
        refused = refusing.result()
    assert (early.returncode, "trimoe cluster deploy first" in early.stderr) == (2, True)
    assert (refused.returncode, "expected the cluster's token" in refused.stderr) == (2, True)
    done = head.trimoe(*words, "--wait-s=120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("trimoe: RUNNING\n")
    return http


def test_the_shipped_config_answers(head: Head, port: int) -> None:
    assert ready(port, head) == ("ready", "shared-1")


def test_probes_and_scrapes_of_the_deploy_files_need_no_token(head: Head, port: int) -> None:
    get(f"{head.agent}/api/healthz")
    get(f"{head.dashboard}/api/gcs_healthz")
    get(f"http://127.0.0.1:{port}/-/healthz")
    wanted = re.compile(
        rb'^ray_serve_deployment_replica_healthy\{.*deployment="InferenceCore"', re.M
    )
    deadline = time.monotonic() + 40
    while not wanted.search(get(f"{head.metrics}/metrics")):
        assert time.monotonic() < deadline
        time.sleep(1)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{head.dashboard}/api/serve/applications/")


def test_a_trace_of_the_caller_reaches_the_steps(head: Head, port: int, spans: Spans) -> None:
    trace_id = secrets.token_hex(16)
    blank = blank_request(registered_tasks()["fraud"], 3)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/infer",
        data=wire.encode_request(replace(blank, tenant="ops")),
        headers={
            "Authorization": f"Bearer {head.api_key}",
            "Content-Type": wire.BINARY_TYPE,
            "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    deadline = time.monotonic() + 20
    while not {(trace_id, "trimoe.queue"), (trace_id, "trimoe.compute")} <= spans.found:
        assert time.monotonic() < deadline, spans.found
        time.sleep(0.2)


def test_the_fraud_service_joins_the_cluster_and_leaves_it_running(
    head: Head, port: int, tmp_path: Path
) -> None:
    """Its features are the offline ones, as everywhere."""
    table = simulate(SimulationConfig(num_cards=50, num_terminals=50, num_days=10, seed=3))[:500]
    with EmbeddedBroker() as broker:
        topics = make_topics(broker.bootstrap_servers, "t")
        kafka = KafkaSettings(broker.bootstrap_servers, "joined")
        words = fraud_run(broker, topics, "--replay", "--group=joined", f"--state={tmp_path}")
        command = [sys.executable, "-W", "ignore", "-c", TRIMOE, *words]
        with closing(KafkaStream(kafka)) as stream:
            send_table(kafka, table, table, topics)
            service = subprocess.Popen(command, env=head.environment, cwd=ROOT)
            found = Collector(stream, topics).read_until(len(table), 120)
            service.send_signal(signal.SIGTERM)
            assert service.wait(60) == 0
    assert found.num_equal(offline_digests(table)) == len(table)
    assert found.dead_letters == 0
    assert ready(port, head) == ("ready", "shared-1")
