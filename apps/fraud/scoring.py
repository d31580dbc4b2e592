"""One poll, one request: ask the model, wait out its absence, isolate what it refuses."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apps.fraud.features import Features
from cluster.client import Client
from cluster.errors import InvalidRequestError, UnavailableError, UnknownModelError
from cluster.schemas import InferRequest, InferResponse, SequenceStatus, ServiceClass

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 2.0


class Scores(NamedTuple):
    """Answers for B transactions.

    Args:
        outputs: Model outputs, float [B, D_out]; rows with an error are meaningless.
        model_versions: Version that computed each row.
        errors: Error class and message of the rows that got no usable output.
    """

    outputs: NDArray[np.float32]
    model_versions: list[str]
    errors: dict[int, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Sends features to the shared model and never gives up on a valid request.

    Args:
        client: The one door to the model.
        tenant: Whose queue and share the requests use.
        model_version: Version or alias to ask for.
        deadline_ms: Per attempt.
        num_outputs: Columns of the task's outputs.
        sleep: Waits between attempts.
    """

    client: Client
    tenant: str = "fraud"
    model_version: str = "stable"
    deadline_ms: float = 1000.0
    num_outputs: int = 28
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def score(self, features: Features, request_id: str) -> Scores:
        """Return the scores of all transactions, however long the model is away.

        A request that the platform refuses as invalid is halved until the
        transactions at fault are alone; those carry the error.
        """
        num_sequences = features.cu_seqlens.size - 1
        try:
            response = await self._ask(features, request_id)
        except InvalidRequestError as error:
            if num_sequences == 1:
                outputs = np.full((1, self.num_outputs), np.nan, np.float32)
                return Scores(outputs, [""], {0: ("InvalidRequestError", str(error))})
            middle = num_sequences // 2
            return _joined(
                await self.score(_part(features, 0, middle), request_id + "l"),
                await self.score(_part(features, middle, num_sequences), request_id + "r"),
            )
        return _checked(response, num_sequences)

    async def _ask(self, features: Features, request_id: str) -> InferResponse:
        request = InferRequest(
            request_id=request_id,
            tenant=self.tenant,
            task="fraud",
            features=features.history,
            cu_seqlens=features.cu_seqlens,
            extras={"context": features.context.astype(np.float32)},
            service_class=ServiceClass.STREAM,
            deadline_ms=self.deadline_ms,
            model_version=self.model_version,
        )
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                return await self.client.infer(request)
            except (UnavailableError, UnknownModelError) as error:
                logger.warning("model unavailable, again in %.2f s: %s", backoff_s, error)
                await self.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)


def _checked(response: InferResponse, num_sequences: int) -> Scores:
    outputs: NDArray[Any] = response.outputs[response.cu_seqlens[:-1]]
    bad = (response.status != SequenceStatus.OK) | ~np.isfinite(outputs).all(axis=1)
    message = "expected finite model outputs, got NaN or infinity"
    errors = {int(i): ("NonFiniteOutput", message) for i in np.flatnonzero(bad)}
    return Scores(outputs, [response.model_version] * num_sequences, errors)


def _part(features: Features, begin: int, end: int) -> Features:
    rows = features.cu_seqlens[begin : end + 1]
    return Features(
        context=features.context[begin:end],
        history=features.history[rows[0] : rows[-1]],
        cu_seqlens=rows - rows[0],
    )


def _joined(left: Scores, right: Scores) -> Scores:
    shift = len(left.model_versions)
    return Scores(
        np.concatenate([left.outputs, right.outputs]),
        left.model_versions + right.model_versions,
        left.errors | {shift + i: error for i, error in right.errors.items()},
    )
