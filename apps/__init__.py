"""What users run: three applications and the command line; no torch and no ray at service time."""
