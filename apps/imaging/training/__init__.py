"""Weights of the imaging tasks and the public protocols; all that knows ``core_model``."""
