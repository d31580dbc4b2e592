"""A recorded request gets a span for its wait and one for its steps; no other gets any."""

from collections.abc import Iterator

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster import tracing
from cluster.schemas import InferRequest, InferResponse, Timings


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    yield kept
    provider.shutdown()


def answered() -> tuple[InferRequest, InferResponse]:
    request = InferRequest(
        request_id="card 4711",
        tenant="t",
        task="fraud",
        features=np.zeros((3, 4), dtype=np.float32),
        cu_seqlens=np.array([0, 1, 3], dtype=np.int32),
    )
    response = InferResponse(
        request_id="card 4711",
        outputs=np.zeros((2, 1), dtype=np.float32),
        cu_seqlens=np.arange(3, dtype=np.int32),
        status=np.zeros(2, dtype=np.uint8),
        model_version="fraud-1",
        timings=Timings(queued_ms=2.0, compute_ms=5.0),
        tokens_per_expert=np.zeros((1, 4), dtype=np.int64),
    )
    return request, response


def duration_ms(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


def test_wait_and_steps_follow_one_another_below_the_current_span(
    spans: InMemorySpanExporter,
) -> None:
    with tracing._TRACER.start_as_current_span("request") as parent:
        tracing.trace_answer(*answered())
    wait, steps, whole = spans.get_finished_spans()
    assert [wait.name, steps.name, whole.name] == ["trimoe.queue", "trimoe.compute", "request"]
    assert wait.end_time == steps.start_time
    assert [duration_ms(wait), duration_ms(steps)] == [2.0, 5.0]
    for span in (wait, steps):
        assert span.parent is not None
        assert span.parent.span_id == parent.get_span_context().span_id
        assert span.attributes is not None
        assert span.attributes["trimoe.sequences"] == 2
        assert "card 4711" not in span.to_json()


def test_a_request_that_nobody_traces_costs_no_span(spans: InMemorySpanExporter) -> None:
    tracing.trace_answer(*answered())
    assert not trace.get_current_span().is_recording()
    assert spans.get_finished_spans() == ()
