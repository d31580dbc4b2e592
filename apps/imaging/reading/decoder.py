"""Decoding of compressed images in a process of its own.

Decoders in C can end their process on a broken image, and no exception says so: fuzzed JPEG
lossless and JPEG 2000 made GDCM 3.2 abort.  Here such an image costs its slice.
"""

import io
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from apps.imaging.reading.source import RejectedError

PLUGINS: dict[str, str] = {
    RLELossless: "pydicom",
    **dict.fromkeys((JPEG2000Lossless, JPEG2000), "pylibjpeg"),
    **dict.fromkeys((HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K), "pylibjpeg"),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "pyjpegls"),
    **dict.fromkeys((JPEGLossless, JPEGLosslessSV1, JPEGExtended12Bit), "gdcm"),
}
TIMEOUT_S = 60.0  # for a file; a large multi-frame one takes 20


class Decoder:
    """Starts its process when first used, and another one when that has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def decode(self, raw: bytes, syntax: str) -> NDArray[np.integer]:
        """Return the pixels of a DICOM file.

        Args:
            raw: The file.
            syntax: Its transfer syntax, one of ``PLUGINS``.

        Raises:
            RejectedError: They cannot be decoded.
        """
        connection = self._connection or self._start()
        try:
            connection.send((raw, PLUGINS[syntax]))
            if not connection.poll(TIMEOUT_S):
                raise TimeoutError
            pixels, failure = connection.recv()
        except (OSError, EOFError) as error:  # it has ended, or is to be ended
            self._stop()
            pixels, failure = None, type(error).__name__
        if failure:
            detail = f"expected readable pixels, decoding failed by {failure}"
            raise RejectedError("PIXELS_UNREADABLE", detail)
        return np.asarray(pixels)

    def _start(self) -> Connection:
        self._connection, theirs = multiprocessing.Pipe()
        handle = theirs.fileno()
        self._process = subprocess.Popen(  # noqa: S603 - this module, no input of anybody
            [sys.executable, "-m", __spec__.name, str(handle)],
            pass_fds=[handle],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what decoders print may quote the file
        )
        theirs.close()  # so that either side sees when the other has ended
        return self._connection

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None


def _serve(connection: Connection) -> None:
    """Decode what comes until the other side is gone."""
    while True:
        try:
            raw, plugin = connection.recv()
        except (OSError, EOFError):
            return
        connection.send(_decoded(raw, plugin))


def _decoded(raw: bytes, plugin: str) -> tuple[NDArray[np.integer] | None, str]:
    """Return pixels, or the name of what went wrong."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(raw), force=True)
        return pixel_array(dataset, decoding_plugin=plugin), ""
    except Exception as error:  # noqa: BLE001 - decoders raise of every kind on broken images
        return None, type(error).__name__


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
