"""The smallest preset with seeded weights: a real model that costs next to nothing."""

import torch

from cluster.loading import LoadedModel, OneModel
from cluster.step import StepRunner
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.tasks import registered_tasks


def make_tiny() -> LoadedModel:
    """Return the model, the same in every replica."""
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = MoETransformer(config, ("fraud",)).eval()
    tasks = {"fraud": registered_tasks()["fraud"]}
    runner = StepRunner(model, tasks, config.num_experts, config.num_layers)
    return LoadedModel(runner, "tiny-1")


TINY = OneModel(make_tiny)
