"""Measurements: one module per subject, rows appended to ``results``, never overwritten."""
