"""Triton forms, one module per op, imported lazily by the op's own module and by nothing else."""
