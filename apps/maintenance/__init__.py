"""Failure forecasts for machines, from telemetry and event logs."""
