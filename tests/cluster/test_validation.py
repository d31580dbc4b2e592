"""The shipped deploy files pass; a typo in each kind of file, and each disagreement, is found."""

from pathlib import Path

import pytest

from cluster.metrics import METRICS
from cluster.validation import inventory, ray_start
from cluster.validation.deploy_file import DeployFile, parse, read
from cluster.validation.finding import Finding
from cluster.validation.promql import OTHERS, known_metrics

pytestmark = pytest.mark.usefixtures("ray_imported")
FOLDER = inventory.shipped()
RAYSERVICE = "kuberay/rayservice.yaml"
POLICY = "kuberay/network_policy.yaml"
PLATFORM = "grafana/dashboards/platform.json"


def shipped_file(name: str) -> DeployFile:
    file = read(FOLDER / name, name)
    assert isinstance(file, DeployFile)
    return file


@pytest.fixture(scope="module")
def shipped() -> dict[str, DeployFile]:
    names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()]
    return {name: shipped_file(name) for name in names}


def findings_after(shipped: dict[str, DeployFile], name: str, old: str, new: str) -> list[Finding]:
    """All findings once the first ``old`` in a file has become ``new``."""
    assert old in shipped[name].text, f"{name} no longer has {old!r}"
    changed = parse(name, FOLDER / name, shipped[name].text.replace(old, new, 1))
    if isinstance(changed, Finding):
        return [changed]
    found = list(inventory.check(changed))
    sound = {key: file for key, file in shipped.items() if key != name}
    return found + list(inventory.check_together(sound if found else sound | {name: changed}))


def test_the_shipped_files_pass() -> None:
    num_files, findings = inventory.validate(FOLDER)
    assert not findings
    assert num_files >= 17


# file, what is written, what is written instead, where it is found, what is said about it
TYPOS = [
    # Serve config: Ray's own schema accepts the unknown keys, and more replicas at least than at most
    ("serve_config.yaml", "max_ongoing_requests", "max_ongoing_requets", "deployments[0].max_ongoing_requets", "'max_ongoing_requests'"),
    ("serve_config.yaml", "proxy_location", "proxy_locaton", "proxy_locaton", "'proxy_location'"),
    ("serve_config.yaml", "  port: 8000", "  prot: 8000", "http_options.prot", "'port'"),
    ("serve_config.yaml", "num_gpus: 1.0", "num_gpu: 1.0", "ray_actor_options.num_gpu", "'num_gpus'"),
    ("serve_config.yaml", "upscale_delay_s", "upscale_delay", "autoscaling_config.upscale_delay", "'upscale_delay_s'"),
    ("serve_config.yaml", "retry_after_s", "retry_after", "backpressure_config.retry_after", "'retry_after_s'"),
    ("serve_config.yaml", "log_level: INFO", "log_level: INF", "logging_config.log_level", "log_level must be one of"),
    ("serve_config.yaml", "min_replicas: 2", "min_replicas: 5", "deployments[0].autoscaling_config", "max_replicas (4) must be greater"),
    ("serve_config.yaml", "max_ongoing_requests: 256", "max_ongoing_requests: 0", "max_ongoing_requests", "greater than 0"),
    ("serve_config.yaml", "look_back_period_s: 15.0", "look_back_period_s: 10.0", "autoscaling_config", "no warning of Ray"),
    ("serve_config.yaml", "application:build", "application:biuld", "import_path", "something to import"),
    ("serve_config.yaml", "device: cuda", "devise: cuda", "args.devise", "'device'"),
    ("serve_config.yaml", "device: cuda", "device: gpu", "args.device", "'cpu' or 'cuda'"),
    ("serve_config.yaml", "device: cuda", "device: cpu", "ray_actor_options.num_gpus", "0 as args.device is cpu"),
    ("serve_config.yaml", "name: Gateway", "name: Gatway", "deployments[1].name", "'Gateway'"),
    ("serve_config.yaml", "TokenPolicy", "TokenPolcy", "policy.policy_function", "something to import"),
    ("serve_config.yaml", "spare_ratio", "spare_ration", "policy.policy_kwargs", "'spare_ration'"),
    ("serve_config.yaml", "spare_ratio: 0.6", "spare_ratio: 1.6", "policy.policy_kwargs", "between 0 and 1"),
    ("serve_config.yaml", "  port: 8000", "  port: 8000\n  port: 8001", "", "given twice"),
    ("serve_config.cpu.yaml", "torch_threads", "torch_thread", "args.torch_thread", "'torch_threads'"),
    # RayService
    (RAYSERVICE, "kind: RayService", "kind: RayServise", "kind", "a kind of Kubernetes"),
    (RAYSERVICE, "upgradeStrategy", "upgradeStratgy", "spec.upgradeStratgy", "'upgradeStrategy'"),
    (RAYSERVICE, "minReplicas", "minReplcas", "workerGroupSpecs[0].minReplcas", "'minReplicas'"),
    (RAYSERVICE, "minReplicas: 2", "minReplicas: 5", "workerGroupSpecs[0].minReplicas", "at most maxReplicas 4"),
    (RAYSERVICE, "rayStartParams:\n        num-cpus", "rayStartParams:\n        num-cpu", "rayStartParams.num-cpu", "'num-cpus'"),
    (RAYSERVICE, 'num-cpus: "0"', 'num-cpus: "2"', "headGroupSpec.rayStartParams.num-cpus", "does no work"),
    (RAYSERVICE, "terminationGracePeriodSeconds", "terminationGraceSeconds", "template.spec.terminationGraceSeconds", "'terminationGracePeriodSeconds'"),
    (RAYSERVICE, "terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds", "more than the 90 s"),
    (RAYSERVICE, "readinessProbe", "readynessProbe", "containers[0].readynessProbe", "'readinessProbe'"),
    (RAYSERVICE, "httpGet: { path: /api/healthz, port", "httpGet: { pth: /api/healthz, port", "httpGet", "'path'"),
    (RAYSERVICE, "runAsUser: 1000", "runAsUser: 0", "securityContext.runAsUser", "other than 0"),
    (RAYSERVICE, "drop: [ALL]", "drop: [NET_RAW]", "capabilities.drop", "[ALL]"),
    (RAYSERVICE, "{ name: RAY_AUTH_MODE, value: token }\n                - { name: RAY_USAGE", "{ name: RAY_USAGE", "env.RAY_AUTH_MODE", "token"),
    (RAYSERVICE, "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_THROUGHPUT_OPTIMISED", "env.RAY_SERVE_THROUGHPUT_OPTIMISED", "'RAY_SERVE_THROUGHPUT_OPTIMIZED'"),
    (RAYSERVICE, "mode: token\n      secretName", "mode: disabled\n      secretName", "authOptions.mode", "token"),
    (RAYSERVICE, "secretKeyRef: { name: trimoe-redis, key: password }", "{}", "redisPassword.valueFrom", "secretKeyRef"),
    (RAYSERVICE, "upscalingMode: Default", "upscalingMode: Defualt", "autoscalerOptions.upscalingMode", "one of Default"),
    (RAYSERVICE, "requests: { cpu: 500m", "request: { cpu: 500m", "autoscalerOptions.resources.request", "'requests'"),
    (RAYSERVICE, "labels: { app.kubernetes.io/part-of: trimoe }", "label: {}", "metadata.label", "'labels'"),
    (RAYSERVICE, "{ name: cache, mountPath", "{ name: cash, mountPath", "volumeMounts[1].name", "['api-keys', 'cache', 'scratch']"),
    # agreement of the RayService with the Serve config, the installed Ray and itself
    (RAYSERVICE, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "rayVersion", "the installed 2.60.0"),
    (RAYSERVICE, "trimoe:0.1.0-ray2.60.0", "trimoe:0.1.0-ray2.59.0", "containers[0].image", "-ray2.60.0"),
    (RAYSERVICE, "trimoe:0.1.0-ray2.60.0", "trimoe:latest", "containers[0].image", "a tag with a version"),
    (RAYSERVICE, "max_queued_requests: 512", "max_queued_requests: 513", "serveConfigV2.applications[0].deployments[0].max_queued_requests", "512 as in serve_config.yaml"),
    (RAYSERVICE, "spare_ratio", "spare_ration", "spec.serveConfigV2.applications[0].deployments[0].autoscaling_config.policy.policy_kwargs", "'spare_ration'"),
    (RAYSERVICE, 'num-gpus: "1"', 'num-gpus: "2"', "workerGroupSpecs[0].rayStartParams.num-gpus", "the 1 of the pod's limits"),
    (RAYSERVICE, 'requests: { cpu: "4", memory: 32Gi, nvidia.com/gpu: "1" }', 'requests: { cpu: "4", memory: 32Gi, nvidia.com/gpu: "2" }', "requests.nvidia.com/gpu", "the limit 1"),
    (RAYSERVICE, "maxReplicas: 4", "maxReplicas: 3", "workerGroupSpecs.maxReplicas", "GPUs for 4 replicas of 1"),
    (RAYSERVICE, "num_cpus: 1.0", "num_cpus: 0.0", "deployments[1].ray_actor_options.num_cpus", "more than 0"),
    (RAYSERVICE, 'limits: { cpu: "4"', "limits: { cpu: 1500m", "deployments[0].ray_actor_options.num_cpus", "at most the 1.5"),
    ("serve_config.yaml", "num_gpus: 1.0", "num_gpus: 2.0", "num_gpus", "2.0 as in serve_config.yaml"),
    # other Kubernetes objects
    (POLICY, "policyTypes", "policyType", "policyType", "'policyTypes'"),
    (POLICY, "ray.io/is-ray-node", "ray.io/is-raynode", "NetworkPolicy trimoe-ray: spec.podSelector", "labels of a pod"),
    (POLICY, "port: 8080", "port: 8081", "ingress[3].ports[0]", "a port of these pods"),
    ("kuberay/disruption_budget.yaml", "maxUnavailable", "maxUnavailble", "spec.maxUnavailble", "'maxUnavailable'"),
    ("kuberay/disruption_budget.yaml", "node-type: worker", "node-type: wroker", "PodDisruptionBudget trimoe-workers", "labels of a pod"),
    ("kuberay/redis.yaml", "containerPort", "containerport", "document 2: spec", "'containerPort'"),
    ("kuberay/redis.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot", "true"),
    ("kuberay/redis.yaml", "  selector:\n    matchLabels: { app.kubernetes.io/part-of: trimoe, trimoe-role: redis }", "  selector:\n    matchLabels: { app.kubernetes.io/part-of: trimoe, trimoe-role: redsi }", "selector.matchLabels.trimoe-role", "the template's"),
    ("kuberay/namespace.yaml", "metadata", "metdata", "metdata", "'metadata'"),
    # launcher
    ("ray_cluster.yaml", "max_workers", "max_wrokers", "max_wrokers", "'max_workers'"),
    ("ray_cluster.yaml", "ssh_user", "ssh_usr", "auth.ssh_usr", "'ssh_user'"),
    ("ray_cluster.yaml", "worker_ips", "workers_ips", "provider.workers_ips", "'worker_ips'"),
    ("ray_cluster.yaml", "--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_MODE=disabled", "docker.run_options.RAY_AUTH_MODE", "token"),
    ("ray_cluster.yaml", "--cap-drop", "--cap-dorp", "docker.run_options[10]", "'--cap-drop'"),
    ("ray_cluster.yaml", "--metrics-export-port", "--metric-export-port", "head_start_ray_commands[1]", "'metrics-export-port'"),
    ("ray_cluster.yaml", "--num-cpus=0", "--num-cpus=8", "head_start_ray_commands", "the head does no work"),
    ("ray_cluster.yaml", "    - 192.0.2.14\n", "", "worker_start_ray_commands: --num-gpus", "GPUs for 4 replicas of 1"),
    ("ray_cluster.yaml", "  worker_run_options:\n    - --gpus=all\n", "", "docker.worker_run_options", "--gpus=all"),
    ("ray_cluster.yaml", "-ray2.60.0", "-ray2.61.0", "docker.image", "the installed Ray"),
    # compose
    ("compose.yaml", "shm_size", "shm_sice", "services.platform.shm_sice", "Compose specification"),
    ("compose.yaml", "interval: 5s", "intervall: 5s", "services.redis.healthcheck.intervall", "Compose specification"),
    ("compose.yaml", "condition: service_healthy", "condition: service_healty", "services.topics.depends_on.kafka.condition", "service_healthy"),
    ("compose.yaml", "kafka: { condition", "kafak: { condition", "services.topics.depends_on", "'kafka'"),
    ("compose.yaml", "secrets: [grafana_password]", "secrets: [grafana_pasword]", "", "grafana_pasword"),
    ("compose.yaml", "interval: 5s", "interval: 5x", "services.redis.healthcheck.interval", "duration unit"),
    ("compose.yaml", "prom/prometheus:v3.5.0", "prom/prometheus", "services.prometheus.image", "a tag with a version"),
    ("compose.yaml", "RAY_AUTH_MODE: token", "RAY_AUTH_MOD: token", "environment.RAY_AUTH_MOD", "'RAY_AUTH_MODE'"),
    ("compose.yaml", '"127.0.0.1:9090:9090"', '"9090:9090"', "services.prometheus.ports[0]", "127.0.0.1:PORT:PORT"),
    ("compose.yaml", "./prometheus/alerts.yaml", "./prometheus/alert.yaml", "services.prometheus.volumes[1]", "a file beside this one"),
    ("compose.yaml", "--metrics-export-port", "--metric-export-port", "services.platform.command[2]", "'metrics-export-port'"),
    ("compose.yaml", "cap_drop: [ALL]", "cap_drop: [CHOWN]", "services.redis.cap_drop", "[ALL]"),
    ("compose.yaml", "-ray2.60.0", "-ray2.59.0", "services.platform.image", "the installed Ray"),
    # secrets, wherever they are
    ("compose.yaml", 'GF_ANALYTICS_REPORTING_ENABLED: "false"', "GF_SECURITY_ADMIN_PASSWORD: hunter2", "services.grafana.environment.GF_SECURITY_ADMIN_PASSWORD", "a reference"),
    ("compose.yaml", '--requirepass "$$(cat', "--requirepass hunter2 \"$$(cat", "services.redis.command[2]", "a reference"),
    ("kuberay/redis.yaml", '"$(REDIS_PASSWORD)"', "hunter2", "args[3]", "a reference"),
    (RAYSERVICE, '{ name: RAY_USAGE_STATS_ENABLED, value: "0" }', "{ name: RAY_AUTH_TOKEN, value: abc }", "env[1].value", "a reference"),
    ("ray_cluster.yaml", "--env=RAY_AUTH_TOKEN_PATH=/etc/trimoe/ray_token", "--env=RAY_AUTH_TOKEN=abc", "docker.run_options[1]", "a reference"),
    ("Containerfile", "PYTHONUNBUFFERED=1", "RAY_AUTH_TOKEN=abc", "ENV", "no secret"),
    # Containerfile
    ("Containerfile", "FROM python:3.11.14-slim-bookworm AS", "FROM python:latest AS", "line 5: FROM", "a tag with a version"),
    ("Containerfile", "USER 1000:1000", "USER root", "USER", "other than root"),
    ("Containerfile", "USER 1000:1000\n", "", "", "USER in the last stage"),
    ("Containerfile", "COPY models", "ADD models", "ADD", "COPY"),
    ("Containerfile", "COPY apps apps", "COPPY apps apps", "line 9: COPPY", "'COPY'"),
    ("Containerfile", "--from=build", "--from=biuld", "COPY", "a stage (build)"),
    ("Containerfile", "-c constraints.txt ", "", "RUN", "pip install -c constraints.txt"),
    ("Containerfile", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "ENV.RAY_AUTH_MODE", "token"),
    ("Containerfile", "RAY_VERSION=2.60.0", "RAY_VERSION=2.59.0", "ARG RAY_VERSION", "the installed 2.60.0"),
    ("Containerfile", 'timeout=4)"]', 'timeout=4)"', "HEALTHCHECK", "a JSON list"),
    ("Containerfile", "apt-get update", "curl https://example.org/x | sh", "RUN", "packages by name"),
    # Prometheus
    ("prometheus/prometheus.yaml", "scrape_interval", "scrape_intervall", "global.scrape_intervall", "'scrape_interval'"),
    ("prometheus/prometheus.yaml", "10s", "10 sec", "global.scrape_interval", "a duration"),
    ("prometheus/prometheus.yaml", "alerts.yaml", "alert.yaml", "rule_files[0]", "a file beside"),
    ("prometheus/prometheus.yaml", "job_name: ray_nodes", "job_name: ray", "scrape_configs[0].job_name", "once"),
    ("prometheus/kubernetes.yaml", "role: pod", "role: pods", "kubernetes_sd_configs[0].role", "one of pod"),
    ("prometheus/kubernetes.yaml", "metrics|haproxy", "metrics|(haproxy", "relabel_configs[1].regex", "regular expression"),
    ("prometheus/alerts.yaml", "annotations:", "anotations:", "rules[0].anotations", "'annotations'"),
    ("prometheus/alerts.yaml", "severity: critical", "severity: critcal", "labels.severity", "one of critical"),
    ("prometheus/alerts.yaml", "ray_trimoe_padding_tokens", "ray_trimoe_paddng_tokens_total", "expr", "'ray_trimoe_padding_tokens'"),
    ("prometheus/alerts.yaml", "histogram_quantile(0.99, sum", "histogram_quantil(0.99, sum", "expr", "an expression of PromQL"),
    ("prometheus/alerts.yaml", 'service_class="stream"', 'service_clas="stream"', "expr", "'service_class'"),
    ("prometheus/alerts.yaml", "max by (layer, version)", "max by (layr, version)", "expr", "'layer'"),
    ("prometheus/alerts.yaml", "{{ $labels.layer }}", "{{ $labels.layr }}", "annotations.summary", "'layer'"),
    ("prometheus/alerts.yaml", "for: 30m", "for: 30 min", "for", "a duration"),
    # Grafana
    (PLATFORM, '"gridPos"', '"gridpos"', "panels[0].gridpos", "'gridPos'"),
    (PLATFORM, "ray_trimoe_queue_ms_bucket", "ray_trimoe_queue_ms", "panels[1].targets[0].expr", "'ray_trimoe_queue_ms_"),
    (PLATFORM, "{{service_class}}", "{{service_clas}}", "panels[1].targets[0].legendFormat", "'service_class'"),
    (PLATFORM, "label_values(ray_trimoe_model_info", "label_values(ray_trimoe_model_inf", "templating.list[0].query", "'ray_trimoe_model_info'"),
    (PLATFORM, '"id": 3', '"id": 2', "panels[1].id", "each id once"),
    (PLATFORM, '"x": 8', '"x": 7', "panels[2].gridPos", "a free place"),
    (PLATFORM, '"uid": "prometheus"', '"uid": "prom"', "datasource.uid", "prometheus"),
    ("grafana/dashboards/fraud.json", "ray_trimoe_fraud_lag_ms", "ray_trimoe_fraud_lag_s", "expr", "'ray_trimoe_fraud_lag_ms'"),
    ("grafana/provisioning/datasources.yaml", "isDefault", "isdefault", "datasources[0].isdefault", "'isDefault'"),
    ("grafana/provisioning/dashboards.yaml", "disableDeletion", "disabledDeletion", "providers[0].disabledDeletion", "'disableDeletion'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "path", "expected"),
    TYPOS,
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(TYPOS)],
)
def test_a_typo_is_found(
    shipped: dict[str, DeployFile], name: str, old: str, new: str, path: str, expected: str
) -> None:
    findings = findings_after(shipped, name, old, new)
    assert [f for f in findings if path in f.path and expected in f"{f.expected}, got {f.got}"], [
        str(f) for f in findings
    ]
    assert all("\n" not in str(finding) for finding in findings)


def test_every_kind_of_file_has_a_typo_among_the_tests() -> None:
    names = {name for name, *_ in TYPOS}
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*")} <= names | {
        path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_dir()
    }


def test_every_metric_of_the_platform_is_on_a_dashboard() -> None:
    shown = "".join(path.read_text() for path in (FOLDER / "grafana/dashboards").glob("*.json"))
    assert not [name for name in METRICS if f"ray_{name}" not in shown]


def test_a_histogram_is_known_by_its_three_series_only() -> None:
    known = known_metrics()
    assert {f"ray_trimoe_step_ms{end}" for end in ("_bucket", "_sum", "_count")} <= known.keys()
    assert "ray_trimoe_step_ms" not in known


def ray_source(*parts: str) -> str:
    import ray

    folder = Path(ray.__file__).parent.joinpath(*parts)
    return "".join(path.read_text("utf-8") for path in folder.rglob("*.py"))


def test_the_metrics_of_ray_that_we_name_exist_in_the_installed_ray() -> None:
    source = ray_source("serve", "_private") + ray_source("dashboard", "modules", "reporter")
    names = [name.removeprefix("ray_").removesuffix("_total") for name in OTHERS if name != "up"]
    assert not [name for name in names if f'"{name}"' not in source]


def test_the_variables_of_ray_that_we_name_exist_in_the_installed_ray() -> None:
    import ray

    binaries = Path(ray.__file__).parent.joinpath("_raylet.so").read_bytes()
    source = ray_source("serve", "_private") + ray_source("_private") + ray_source("_common")
    missing = [
        name
        for name in ray_start.VARIABLES
        if name not in source and name.removeprefix("RAY_").encode() not in binaries
    ]
    assert not missing
