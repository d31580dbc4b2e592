"""Fine-tuning of the forecast task on a frozen core: adapter and head learn, the blocks stay.

The blocks are shared with other tasks, so not only their parameters but their selection biases
too are those of the deployed checkpoint afterwards, bit for bit.
"""

import copy

import torch
from torch import Tensor, nn

from apps.maintenance.fleet import Floats32
from apps.maintenance.training.fit import Examples, Fit, learn
from core_model.model import MoETransformer
from core_model.training import TrainSettings

TUNING = TrainSettings(
    epochs=3, batch_size=512, peak_lr=1e-3, weight_decay=0.3, bias_rate=0.0
)  # half the rate of a training from nothing


def fine_tune(
    deployed: MoETransformer, examples: Examples, tree: Floats32, fit: Fit
) -> MoETransformer:
    """Return a copy of a model whose adapter and head have learned from new rows.

    Args:
        deployed: Stays as it is.
        examples: Rows to learn from.
        tree: Cross-fitted answers of the trees on them [N, H * C].
        fit: Seed, device and settings.
    """
    torch.manual_seed(fit.seed)
    model = copy.deepcopy(deployed).to(fit.device)
    core = {name: each.clone() for name, each in core_state(model).items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not _is_core(name))
    learn(model, examples.batch(tree, fit.device), examples, fit)
    model.load_state_dict(core, strict=False)  # averaging and balancing have rounded it
    return model.requires_grad_(True)


def core_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of the shared blocks by name."""
    return {name: each for name, each in model.state_dict().items() if _is_core(name)}


def _is_core(name: str) -> bool:
    return name.startswith("blocks.") or name == "final_norm"
