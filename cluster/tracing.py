"""OpenTelemetry traces: Serve's own spans, and below them what the engine did with a request.

Serve makes spans for its proxy, its routers and its replicas, and carries ``traceparent``
from the HTTP caller to the replica, when a Serve config says

    tracing_config: {enabled: true, exporter_import_path: "cluster.tracing:export_spans",
                     sampling_ratio: 0.01}

The OTLP exporter reads where to send them from the environment (OTEL_EXPORTER_OTLP_ENDPOINT).
Attributes are names and counts; nothing that a request carried.
"""

import time
from collections.abc import Sequence
from typing import Final

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from cluster.schemas import InferRequest, InferResponse

_TRACER: Final = trace.get_tracer("trimoe")
_NS_PER_MS = 1e6


def export_spans() -> Sequence[SpanProcessor]:
    """Return what Serve gives the spans of a process to: an exporter in batches, by OTLP/HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - if traced
        OTLPSpanExporter,
    )

    return [BatchSpanProcessor(OTLPSpanExporter())]


def trace_answer(request: InferRequest, response: InferResponse) -> None:
    """Add two spans below the current one, if it is recorded: the wait, and the steps.

    The steps end now; the wait ends where they start.
    """
    if not trace.get_current_span().is_recording():
        return
    attributes = {
        "trimoe.task": request.task,
        "trimoe.service_class": request.service_class.value,
        "trimoe.model_version": response.model_version,
        "trimoe.sequences": request.num_sequences,
        "trimoe.rows": request.features.shape[0],
    }
    ended = time.time_ns()
    computed = ended - int(response.timings.compute_ms * _NS_PER_MS)
    queued = computed - int(response.timings.queued_ms * _NS_PER_MS)
    for name, start, end in (("queue", queued, computed), ("compute", computed, ended)):
        span = _TRACER.start_span(f"trimoe.{name}", start_time=start, attributes=attributes)
        span.end(end_time=end)
