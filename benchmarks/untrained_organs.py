"""Organ weights that know nothing, for runs that are about processes and not about anatomy."""

from pathlib import Path

import torch

from apps.imaging.calibration import FILE, HU_EDGES, Calibration
from apps.imaging.launch import MODEL
from apps.imaging.segmentation import ORGANS, TASK
from core_model.checkpoint import save_checkpoint
from core_model.config import PRESETS
from core_model.model import MoETransformer

NUM_PROFILE = len(HU_EDGES) - 1 + 6  # tissues; three sizes, step, and two pixel distances


def write_untrained(models: Path, preset: str = "tiny") -> Path:
    """Write seeded weights with a calibration into a folder of models and return that."""
    torch.manual_seed(0)
    save_checkpoint(
        models / MODEL,
        MoETransformer(PRESETS[preset], [TASK]),
        version="imaging-0",
        data="none: untrained",
        metrics={},
        command="benchmarks/untrained_organs.py",
    )
    calibration = Calibration(
        least_sure=dict.fromkeys(ORGANS, 0.9),
        miss_rate=0.1,
        profile_mean=(0.0,) * NUM_PROFILE,
        profile_scale=(1.0,) * NUM_PROFILE,
        farthest=3.0,
        refer_below=0.5,
        sensitivity=0.95,
    )
    calibration.save(models / MODEL / FILE)
    return models
