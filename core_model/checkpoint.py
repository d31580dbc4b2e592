"""Checkpoints: a safetensors file beside a manifest that says what it is and proves it.

    DIR/manifest.json       config, tasks, sha256, data, metrics, command
    DIR/model.safetensors   tensors; floating weights in float16, thresholds and leaves of trees
                            exact, whole numbers in the narrowest type that holds them

Where every tree has one answer, the embedding of a leaf repeats the leaf in that answer's
place; then only which answer each tree has is stored (``tree_answer_SE``).
No pickle is read or written.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_model.config import MoEConfig
from core_model.model import MoETransformer
from core_model.series import SeriesAdapter
from core_model.tabular import TabularAdapter
from core_model.trees import answers_of, embed_answers
from kernels.trees import TreeEnsemble

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
EXACT = ("tree_threshold_SN", "tree_leaf_SL", "tree_base", "expert_bias", "context_mean")
ANSWER = "tree_answer_SE"
WHOLE = (torch.uint8, torch.int16, torch.int32)


class CheckpointError(ValueError):
    """A checkpoint is missing, altered or does not fit its configuration."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        version: Name and number, such as ``"fraud-1"``.
        config: ``MoEConfig`` fields.
        tasks: Tasks it serves.
        sha256: Of the weights file, hex.
        data: What it was trained on, and under which licence.
        metrics: Measured numbers, by name.
        command: The command that made it.
    """

    version: str
    config: Mapping[str, Any]
    tasks: tuple[str, ...]
    sha256: str
    data: str
    metrics: Mapping[str, float]
    command: str


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _narrow(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        return tensor.contiguous() if name.endswith(EXACT) else tensor.half()
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return tensor.contiguous()
    low, high = int(tensor.min()), int(tensor.max())
    held = (t for t in WHOLE if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return tensor.to(next(held, tensor.dtype)).contiguous()


def _stored(model: MoETransformer) -> dict[str, Tensor]:
    """Return what is written, by name."""
    tensors = {name: _narrow(name, value) for name, value in model.state_dict().items()}
    for task, adapter in _with_trees(model).items():
        answer_SE = answers_of(adapter.ensemble)
        if answer_SE is not None:
            del tensors[f"adapters.{task}.tree_leaf_embedding_SLE"]
            tensors[f"adapters.{task}.{ANSWER}"] = answer_SE.cpu()
    return tensors


def _with_trees(model: MoETransformer) -> dict[str, TabularAdapter | SeriesAdapter]:
    """Return the adapters that have trees, by task."""
    return {
        task: adapter
        for task, adapter in model.adapters.items()
        if isinstance(adapter, TabularAdapter | SeriesAdapter)
    }


def save_checkpoint(
    directory: Path,
    model: MoETransformer,
    *,
    version: str,
    data: str,
    metrics: Mapping[str, float],
    command: str,
) -> Manifest:
    """Write weights and manifest; return the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(_stored(model), directory / WEIGHTS)
    manifest = Manifest(
        version=version,
        config=model.config.to_dict(),
        tasks=tuple(model.adapters),
        sha256=_sha256(directory / WEIGHTS),
        data=data,
        metrics=dict(metrics),
        command=command,
    )
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: It is missing or not a manifest.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**values, "tasks": tuple(values["tasks"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: expected a checkpoint manifest, got {error}"
        raise CheckpointError(message) from error


def load_checkpoint(directory: Path, device: str = "cpu") -> tuple[MoETransformer, Manifest]:
    """Load a model in evaluation mode after its weights file proved to be the stated one.

    Raises:
        CheckpointError: A file is missing or altered, or a tensor is missing or misshapen.
    """
    manifest = read_manifest(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        message = f"{path}: expected the weights that {MANIFEST} describes, found no file"
        raise CheckpointError(message)
    found = _sha256(path)
    if found != manifest.sha256:
        message = f"{path}: expected sha256 {manifest.sha256[:16]}.., got {found[:16]}.."
        raise CheckpointError(message)
    try:
        model = MoETransformer(MoEConfig.from_dict(manifest.config), manifest.tasks)
        _fill(model, load_file(path))
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        message = f"{path}: {' '.join(str(error).split())}"
        raise CheckpointError(message) from error
    return model.eval().to(device), manifest


def _fill(model: MoETransformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into the model, tree ensembles first: their sizes are data."""
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for task, adapter in _with_trees(model).items():
        prefix = f"adapters.{task}.tree_"
        answer_SE, leaf_SL = (
            wide.pop(f"adapters.{task}.{ANSWER}", None),
            wide.get(f"{prefix}leaf_SL"),
        )
        if answer_SE is not None and leaf_SL is not None:
            wide[f"{prefix}leaf_embedding_SLE"] = embed_answers(leaf_SL, answer_SE)
        missing = sorted(name for name in TreeEnsemble._fields if prefix + name not in wide)
        if missing:
            message = f"expected the tree arrays of {task}, missing {missing}"
            raise CheckpointError(message)
        own = adapter.ensemble._asdict().items()
        arrays = {name: wide[prefix + name].to(usual.dtype) for name, usual in own}
        adapter.set_ensemble(TreeEnsemble(**arrays))
    model.load_state_dict(wide)
