"""What ``trimoe maintenance forecast`` does: a moment, a stretch of the past, or a plant live."""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apps.maintenance.alerts import AlertBook
from apps.maintenance.edge.lock import sole_agent
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.book import (
    ALERT_HORIZON,
    message_of,
    rule_of,
    see_moment,
    see_repairs,
)
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.dispatch import Dispatch
from apps.maintenance.forecasts.live import Live
from apps.maintenance.forecasts.moment import Moment, forecast_hour
from apps.maintenance.forecasts.records import as_text, records_of, write_json, write_table
from apps.maintenance.forecasts.webhook import Webhook
from apps.maintenance.protocol import ROW_STEP
from apps.maintenance.sources import read_source
from apps.maintenance.telemetry.history import History
from apps.maintenance.telemetry.intake import REJECTED, Intake
from apps.maintenance.telemetry.messages import KINDS
from apps.maintenance.telemetry.mqtt import ACKNOWLEDGE, Address, Connection
from apps.maintenance.telemetry.plant import Plant
from apps.maintenance.telemetry.receiver import Receiver
from cluster.client import Client, HttpClient, api_key_from_environment
from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    from apps.maintenance.forecasts.courier import Send

ALERTS = "alerts.jsonl"
CONNECT_S = 15.0


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    calibration = Calibration.read(args.model)
    client = HttpClient(args.url, api_key=api_key_from_environment())
    try:
        if args.mqtt:
            return run_live(args, client, calibration)
        return run_past(args, client, calibration)
    finally:
        client.close()


def run_past(args: argparse.Namespace, client: Client, calibration: Calibration) -> int:
    """Forecast a moment of a record, or a stretch of it.

    Raises:
        ConfigurationError: The record does not hold the time, or nothing is known there.
    """
    fleet = calibration.align(read_source(args.data))
    last = fleet.num_hours - 1 if args.at is None else fleet.hour_of(args.at)
    first = last if args.since is None else fleet.hour_of(args.since)
    if not 0 <= first <= last < fleet.num_hours:
        message = f"time: expected {fleet.start} and {fleet.num_hours - 1} hours after it at most"
        raise ConfigurationError(message)
    moments, alerts = asyncio.run(_stretch(client, fleet, range(first, last + 1), calibration))
    if not moments:
        message = "expected telemetry or logs up to that time, found none"
        raise ConfigurationError(message)
    print_moment(moments[-1], calibration)
    for alert in alerts:
        sys.stdout.write(f"alert {json.dumps(alert)}\n")
    if args.out:
        rows = [row for moment in moments for row in records_of(moment, calibration)]
        write_table(rows, args.out)
        text = "".join(f"{json.dumps(alert)}\n" for alert in alerts)
        (args.out / ALERTS).write_text(text, encoding="utf-8")
    if args.json:
        write_json(moments[-1], calibration, args.json)
    return 0


async def _stretch(
    client: Client, fleet: Fleet, hours: range, calibration: Calibration
) -> tuple[list[Moment], list[Mapping[str, Any]]]:
    """Return the forecasts of every third hour, or of the only one, and the alerts on the way."""
    book = AlertBook(rule_of(calibration))
    moments, alerts = [], []
    chosen = hours if len(hours) == 1 else [h for h in hours if h > 0 and h % ROW_STEP == 0]
    for hour in chosen:
        moment = await forecast_hour(client, fleet, hour, calibration)
        if moment is None:
            continue
        moments.append(moment)
        changed = [*see_repairs(book, fleet, hour)]
        changed += await see_moment(book, moment, calibration, client)
        alerts += [message_of(alert) for alert in changed]
        if len(chosen) > 1 and sys.stderr.isatty():
            sys.stderr.write(f"\r{moment.time}, {len(alerts)} changes of alerts")
    return moments, alerts


def run_live(args: argparse.Namespace, client: Client, calibration: Calibration) -> int:
    """Forecast a plant over MQTT until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: An argument is missing, or the broker does not let us listen.
    """
    if args.plant is None or args.state is None or args.at or args.since or args.out:
        message = "--mqtt: expected --plant and --state, and none of --at, --since and --out"
        raise ConfigurationError(message)
    plant, address = Plant.read(args.plant), Address.parse(args.mqtt)
    state: Path = args.state
    state.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    name = f"trimoe-{socket.gethostname()}-{state.resolve().name}"
    with sole_agent(state), Connection(address, name, [*KINDS, ACKNOWLEDGE]) as connection:
        if not connection.wait_until_connected(CONNECT_S):
            reason = connection.refusal or f"no answer within {CONNECT_S:.0f} s"
            message = f"{address.host}:{address.port}: expected an MQTT broker, got {reason}"
            raise ConfigurationError(message)
        ways: dict[str, Send] = {
            "mqtt": lambda alert: connection.publish(
                f"{alert['machine']}/alert", json.dumps(alert).encode()
            )
        }
        if args.webhook:
            secret = os.environ.get("TRIMOE_WEBHOOK_SECRET", "").encode()
            ways["webhook"] = Webhook(args.webhook, secret).send
        dispatch = Dispatch(state, calibration, ways, args.dashboard)
        intake = Intake(plant, address.prefix, state / REJECTED, time.time)
        history = History(state / "history", plant)
        receiver = Receiver(connection, intake, history, dispatch.acknowledge_by_message)
        live = Live(state / "history", receiver, dispatch, client, calibration)

        def show(moment: Moment) -> None:
            print_moment(moment, calibration)
            sys.stdout.write(f"messages {json.dumps(live.counts)}\n")
            if args.json:
                write_json(moment, calibration, args.json)

        live.run(stopping, show)
    return 0


def print_moment(moment: Moment, calibration: Calibration) -> None:
    """Print the forecasts of a moment."""
    sys.stdout.write(as_text(moment, calibration, ALERT_HORIZON) + "\n")
    sys.stdout.flush()
