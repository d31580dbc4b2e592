"""Strict validation of every deploy file without a network: unknown keys, values, agreement."""
