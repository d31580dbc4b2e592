"""Forecasts of a fleet by the shared deployment, the alerts that follow, and where they go."""
