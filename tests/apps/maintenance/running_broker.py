"""A real MQTT broker in a thread, which knows one user."""

import asyncio
import socket
import threading
from pathlib import Path

from amqtt.broker import Broker
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

USER, PASSWORD = "trimoe", "a password of this test"


class RunningBroker:
    """A broker on this machine that can be stopped and started again on its port.

    Args:
        passwords: File of its users; it keeps sessions of named users alone.
    """

    def __init__(self, passwords: Path) -> None:
        hashed = PasswordHash((Argon2Hasher(time_cost=1, memory_cost=64),)).hash(PASSWORD)
        passwords.write_text(f"{USER}:{hashed}\n")
        self._passwords = passwords
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._broker: Broker | None = None

    def start(self) -> None:
        async def begin() -> Broker:
            broker = Broker(
                {
                    "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}},
                    "plugins": {
                        "amqtt.plugins.authentication.FileAuthPlugin": {
                            "password_file": str(self._passwords)
                        }
                    },
                }
            )
            await broker.start()
            return broker

        self._broker = asyncio.run_coroutine_threadsafe(begin(), self._loop).result(10)

    def stop(self) -> None:
        if self._broker is not None:
            asyncio.run_coroutine_threadsafe(self._broker.shutdown(), self._loop).result(10)
            self._broker = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
