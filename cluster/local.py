"""The same engine in this process: tests, notebooks, training reports, one-machine tools."""

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.engine import Engine
from cluster.errors import UnavailableError
from cluster.loading import LoadedModel, load_checkpoint
from cluster.scheduler import Limits
from cluster.schemas import InferRequest, InferResponse


class LocalClient:
    """A client whose engine runs on an event loop of its own thread.

    May be called from any event loop, also from several in turn.

    Args:
        model: What to serve.
        limits: Settings of the scheduler.
    """

    def __init__(self, model: LoadedModel, limits: Limits | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = Engine(model, limits=limits)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: str = "cpu") -> Self:
        """Serve the checkpoint of a directory.

        Raises:
            CheckpointError: It is missing, altered or does not fit its configuration.
        """
        return cls(load_checkpoint(Path(path), device))

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        question = self._engine.infer(request)
        try:
            answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError as error:
            question.close()
            message = f"request {request.request_id}: expected an open client, got a closed one"
            raise UnavailableError(message) from error
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Stop the engine; requests that wait fail."""
        asyncio.run_coroutine_threadsafe(self._engine.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._engine.start)
        self._loop.run_forever()
