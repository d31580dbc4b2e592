"""A connection with a deadline that holds whatever the other side does.

A socket's own timeout begins anew with every byte.  Here a timer shuts the socket from outside
when the time is up, so that neither slow headers nor one byte a second outlast it.
"""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


@contextmanager
def open_connection(url: str, stall_s: float, end_s: float) -> Iterator[http.client.HTTPConnection]:
    """Open a connection to the server of a URL, and close it at the end of the block.

    Args:
        url: http or https.
        stall_s: How long to wait for a byte.
        end_s: When it is shut, on the clock of ``time.monotonic``.

    Raises:
        OSError: Nobody answers; TimeoutError if there is no time left.
    """
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        message = "expected time left, got none"
        raise TimeoutError(message)
    parts = urlsplit(url)
    timeout_s = min(stall_s, left_s)
    if parts.scheme == "https":
        trusted = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.netloc, timeout=timeout_s, context=trusted
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    connection.connect()
    watchdog = threading.Timer(left_s, _shut, [connection.sock])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield connection
    finally:
        watchdog.cancel()
        connection.close()


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
