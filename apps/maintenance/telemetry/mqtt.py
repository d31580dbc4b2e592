"""The way to a broker: QoS 1, a session that outlives the connection, bounded back-off.

    mqtt://[USER@]HOST[:1883]/PREFIX    mqtts://... with TLS; the password is $TRIMOE_MQTT_PASSWORD

A message is acknowledged by hand, after it is on disk.  What was not acknowledged when a
connection or this process ended comes again, because the session has a name that stays.
"""

import logging
import os
import queue
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from cluster.errors import ConfigurationError, UnavailableError

LOG = logging.getLogger(__name__)
PORTS = {"mqtt": 1883, "mqtts": 8883}
QOS = 1
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1, 60
KEEP_ALIVE_S = 30
MAX_BATCH = 500  # messages of one sync of the disk
PUBLISH_S = 10.0
ACKNOWLEDGE = "acknowledge"  # topic below a machine: {"component", "name"}


@dataclass(frozen=True, slots=True)
class Address:
    """A broker and the prefix of our topics there.

    Args:
        host: Of the broker; port: likewise.
        prefix: Without a slash at its ends.
        user: Empty for none.
        is_tls: Whether the connection is encrypted.
    """

    host: str
    port: int
    prefix: str
    user: str = ""
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return what a URL says.

        Raises:
            ConfigurationError: It is not one of ours.
        """
        parts = urlsplit(url)
        prefix = unquote(parts.path).strip("/")
        if parts.scheme not in PORTS or not parts.hostname or not prefix or parts.password:
            message = (
                "mqtt: expected mqtt://[USER@]HOST[:PORT]/PREFIX and the password in "
                f"$TRIMOE_MQTT_PASSWORD, got {parts.scheme}://{parts.hostname}{parts.path}"
            )
            raise ConfigurationError(message)
        if set("+#") & set(prefix):
            message = f"mqtt: expected a prefix without wildcards, got {prefix!r}"
            raise ConfigurationError(message)
        port = parts.port or PORTS[parts.scheme]
        return cls(parts.hostname, port, prefix, parts.username or "", parts.scheme == "mqtts")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message of the broker that waits for its acknowledgement.

    Args:
        topic: Where it came; payload: what it says.
        mid: Its number in the session.
    """

    topic: str
    payload: bytes
    mid: int


class Connection:
    """A session with a broker, kept up by a thread of its own.

    Args:
        address: Of the broker.
        name: Of the session; two processes may not share it.
        kinds: Topics below each machine to listen to; none for a mere sender.
    """

    def __init__(self, address: Address, name: str, kinds: Sequence[str] = ()) -> None:
        self._address, self._kinds = address, kinds
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._connected, self._listening = threading.Event(), threading.Event()
        self.refusal = ""
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=name, clean_session=False, manual_ack=True
        )
        if address.user:
            client.username_pw_set(address.user, os.environ.get("TRIMOE_MQTT_PASSWORD"))
        if address.is_tls:
            client.tls_set_context(ssl.create_default_context())
        client.reconnect_delay_set(FIRST_BACKOFF_S, LAST_BACKOFF_S)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        self._client = client

    def __enter__(self) -> Self:
        self._client.connect_async(self._address.host, self._address.port, KEEP_ALIVE_S)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait_until_connected(self, timeout_s: float) -> bool:
        """Wait for the first connection; return whether it stands."""
        return self._connected.wait(timeout_s)

    def wait_until_listening(self, timeout_s: float) -> bool:
        """Wait for the first subscription; return whether it stands.

        A broker may hold it back until what it has sent again is acknowledged.
        """
        return self._listening.wait(timeout_s)

    def arrived(self, timeout_s: float) -> list[Delivery]:
        """Return what has come, waiting for a first message so long."""
        found: list[Delivery] = []
        try:
            found.append(self._arrived.get(timeout=timeout_s))
            while len(found) < MAX_BATCH:
                found.append(self._arrived.get_nowait())
        except queue.Empty:
            pass
        return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that messages are on disk; one that it misses comes again."""
        for each in deliveries:
            self._client.ack(each.mid, QOS)

    def publish(self, topic: str, payload: bytes) -> None:
        """Send a message below the prefix and wait until the broker has it.

        Raises:
            UnavailableError: It did not take it in time; it may have it nevertheless.
        """
        if not self._client.is_connected():
            message = f"{self._address.host}: expected a broker that answers, got none"
            raise UnavailableError(message)
        sent = self._client.publish(f"{self._address.prefix}/{topic}", payload, QOS)
        try:
            sent.wait_for_publish(PUBLISH_S)
        except (RuntimeError, ValueError) as error:
            message = f"{self._address.host}: expected a broker that takes {topic}, got {error}"
            raise UnavailableError(message) from error
        if not sent.is_published():
            message = f"{self._address.host}: expected an acknowledgement within {PUBLISH_S:.0f} s"
            raise UnavailableError(message)

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: object, reason: object, _props: object
    ) -> None:
        if getattr(reason, "is_failure", False):
            self.refusal = str(reason)
            LOG.warning("%s: the broker refuses: %s", self._address.host, reason)
            return
        self.refusal = ""
        self._connected.set()
        LOG.info("%s: connected", self._address.host)
        topics = [(f"{self._address.prefix}/+/{kind}", QOS) for kind in self._kinds]
        if topics:
            client.subscribe(topics)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, reasons: list[Any], _props: object
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            LOG.error("%s: the broker does not let us listen", self._address.host)
        else:
            self._listening.set()

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, reason: object, _props: object
    ) -> None:
        LOG.info("%s: disconnected: %s", self._address.host, reason)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        self._arrived.put(Delivery(message.topic, bytes(message.payload), message.mid))
