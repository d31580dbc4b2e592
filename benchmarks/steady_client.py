"""A client without a model: scores by amount, so that a run measures the service alone."""

import numpy as np

from apps.fraud.decision import FIRST_CONTRIBUTION
from apps.fraud.features import NUM_CONTEXT
from cluster.schemas import InferRequest, InferResponse, Timings


class SteadyClient:
    """Answers at once: logit = amount / 100 - 3."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        count = request.num_sequences
        outputs = np.zeros((count, FIRST_CONTRIBUTION + NUM_CONTEXT), np.float32)
        outputs[:, 0] = request.extras["context"][:, 0] / 100.0 - 3.0
        return InferResponse(
            request.request_id,
            outputs,
            np.arange(count + 1, dtype=np.int32),
            np.zeros(count, np.uint8),
            "steady",
            Timings(0.0, 0.0),
            np.zeros((1, 1), np.int64),
        )
