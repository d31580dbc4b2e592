"""Signed models from the platform to edge boxes: publishing, transport, rollout."""
