"""Every metric of the platform: one list, from which metrics are made and dashboards checked.

Recorded through Ray's metric agents, which each node serves to Prometheus; there a name
gains the prefix ``ray_``.  Labels are bounded sets: no request id, no card, no patient.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MILLISECONDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 35.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0)
TOKENS: Final = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0)


class Kind(StrEnum):
    """How a metric behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Args:
        name: Without Ray's prefix; ends in its unit, counters in ``_total``.
        kind: Counter, gauge or histogram.
        help: One sentence.
        labels: Names of its labels.
        bounds: Upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS: Final = {
    metric.name: metric
    for metric in (
        # the replica
        Metric(
            "trimoe_queue_ms",
            Kind.HISTOGRAM,
            "Wait of a request for its first step.",
            ("service_class",),
            MILLISECONDS,
        ),
        Metric("trimoe_step_ms", Kind.HISTOGRAM, "Duration of a step.", (), MILLISECONDS),
        Metric("trimoe_step_tokens", Kind.HISTOGRAM, "Tokens of a step.", (), TOKENS),
        Metric(
            "trimoe_tokens_total",
            Kind.COUNTER,
            "Tokens computed for requests.",
            ("task", "service_class", "version"),
        ),
        Metric("trimoe_padding_tokens", Kind.GAUGE, "Tokens of a step computed for nobody; 0."),
        Metric(
            "trimoe_requests_total",
            Kind.COUNTER,
            "Requests by outcome: ok or the error's name.",
            ("task", "service_class", "version", "outcome"),
        ),
        Metric(
            "trimoe_deadline_misses_total",
            Kind.COUNTER,
            "Requests refused, dropped or answered behind their deadline.",
            ("service_class",),
        ),
        Metric("trimoe_queued_tokens", Kind.GAUGE, "Tokens that wait.", ("service_class",)),
        Metric(
            "trimoe_predicted_delay_ms",
            Kind.GAUGE,
            "Predicted time until everything that waits is done.",
        ),
        Metric(
            "trimoe_expert_tokens_total",
            Kind.COUNTER,
            "Routed (token, choice) pairs.",
            ("layer", "expert", "version"),
        ),
        Metric(
            "trimoe_expert_imbalance_ratio",
            Kind.GAUGE,
            "Largest over mean expert load since the start.",
            ("layer", "version"),
        ),
        Metric(
            "trimoe_model_info",
            Kind.GAUGE,
            "1 for each loaded version and the alias it serves.",
            ("version", "alias"),
        ),
        Metric(
            "trimoe_shadow_disagreement_total",
            Kind.COUNTER,
            "Shadowed sequences whose answer differed beyond the tolerance.",
            ("version",),
        ),
        Metric("trimoe_shadow_sequences_total", Kind.COUNTER, "Shadowed sequences.", ("version",)),
        # the gateway
        Metric(
            "trimoe_http_requests_total",
            Kind.COUNTER,
            "HTTP requests.",
            ("route", "status", "tenant"),
        ),
        Metric(
            "trimoe_http_ms",
            Kind.HISTOGRAM,
            "Duration of an HTTP request.",
            ("route",),
            MILLISECONDS,
        ),
        Metric(
            "trimoe_refused_total",
            Kind.COUNTER,
            "HTTP requests refused at the door: header, key, rate, body.",
            ("reason",),
        ),
        Metric("trimoe_jobs_total", Kind.COUNTER, "Jobs that have ended.", ("outcome",)),
        # the fraud workers
        Metric("trimoe_fraud_decisions_total", Kind.COUNTER, "Decisions sent.", ("decision",)),
        Metric(
            "trimoe_fraud_dead_letters_total", Kind.COUNTER, "Dead letters sent.", ("error_class",)
        ),
        Metric(
            "trimoe_fraud_lag_ms",
            Kind.GAUGE,
            "Age of the newest answered transaction.",
            ("worker",),
        ),
    )
}
