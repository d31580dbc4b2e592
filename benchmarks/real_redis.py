"""Redis itself on 127.0.0.1, in memory, for the state of a Ray head that may restart."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from apps.fraud.brokers import free_ports
from cluster.errors import ConfigurationError

_START_S = 10.0


@contextmanager
def real_redis() -> Iterator[str]:
    """Run a server until the block ends; yields its HOST:PORT.

    Raises:
        ConfigurationError: There is no ``redis-server``, or it does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        message = "expected the program redis-server, found none; apt-get install redis-server"
        raise ConfigurationError(message)
    (port,) = free_ports(1)
    with TemporaryDirectory(prefix="trimoe-redis-") as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        process = subprocess.Popen(  # noqa: S603 - our own command line
            [*command, "--dir", folder], stdout=subprocess.DEVNULL
        )
        try:
            _await_port(process, port)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _await_port(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    message = f"redis-server: expected an answer at port {port} within {_START_S:.0f} s, got none"
    raise ConfigurationError(message)
