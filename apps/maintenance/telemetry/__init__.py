"""Telemetry in: messages over MQTT, a history that loses and doubles nothing, the fleet out of it."""
