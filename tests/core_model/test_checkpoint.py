import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_model.builtin_tasks import FRAUD, NUM_CONTEXT
from core_model.checkpoint import (
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    Manifest,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.tabular import TabularAdapter
from core_model.trees import embed_answers

MakeBatch = Callable[..., RaggedBatch]
TREE = "adapters.fraud.tree_"
EXACT = ("expert_bias", "context_mean", TREE + "threshold_SN", TREE + "leaf_SL", TREE + "base")


def save(folder: Path, model: MoETransformer) -> Manifest:
    return save_checkpoint(
        folder,
        model,
        version="fraud-7",
        data="none",
        metrics={"ap": 0.5},
        command="trimoe fraud train",
    )


@pytest.fixture
def folder(tmp_path: Path, model: MoETransformer) -> Path:
    save(tmp_path / "fraud", model)
    return tmp_path / "fraud"


def edit_manifest(folder: Path, **values: Any) -> None:  # noqa: ANN401 - JSON
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights file and let the manifest vouch for it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit_manifest(folder, sha256=sha256_of(folder / WEIGHTS))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_tensors_come_back_rounded_once(folder: Path, model: MoETransformer) -> None:
    model.blocks[0].moe.expert_bias.copy_(torch.rand(4))  # type: ignore[union-attr,operator]
    save(folder, model)
    loaded, _ = load_checkpoint(folder)
    stored = loaded.state_dict()
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        exact = name.endswith(EXACT) or not tensor.is_floating_point()
        assert torch.equal(stored[name], tensor if exact else tensor.half().float()), name
        assert stored[name].dtype == tensor.dtype, name


def test_a_loaded_model_is_stored_bit_by_bit_the_same(folder: Path, tmp_path: Path) -> None:
    loaded, manifest = load_checkpoint(folder)
    again = save(tmp_path / "again", loaded)
    assert again == manifest
    reloaded, _ = load_checkpoint(tmp_path / "again")
    assert all(
        torch.equal(tensor, reloaded.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )


def test_trees_of_one_answer_each_are_stored_without_embeddings_and_come_back_exactly(
    folder: Path, model: MoETransformer
) -> None:
    adapter = model.adapters["fraud"]
    assert isinstance(adapter, TabularAdapter)
    leaf_SL = adapter.ensemble.leaf_SL
    answer_SE = torch.eye(leaf_SL.shape[0], NUM_CONTEXT, dtype=torch.bool)
    embedding_SLE = embed_answers(leaf_SL, answer_SE)
    adapter.set_ensemble(adapter.ensemble._replace(leaf_embedding_SLE=embedding_SLE))
    save(folder, model)
    stored = load_file(folder / WEIGHTS)
    assert torch.equal(stored[TREE + "answer_SE"], answer_SE)
    assert TREE + "leaf_embedding_SLE" not in stored
    loaded = load_checkpoint(folder)[0].state_dict()
    assert torch.equal(loaded[TREE + "leaf_embedding_SLE"], embedding_SLE)


def test_whole_numbers_are_stored_narrow_and_come_back_wide(
    folder: Path, model: MoETransformer
) -> None:
    adapter = model.adapters["fraud"]
    assert isinstance(adapter, TabularAdapter)
    for highest, dtype in ((255, torch.uint8), (256, torch.int16), (40_000, torch.int32)):
        feature_SN = adapter.ensemble.feature_SN.clone()
        feature_SN[0, 0] = highest
        adapter.set_ensemble(adapter.ensemble._replace(feature_SN=feature_SN))
        save(folder, model)
        assert load_file(folder / WEIGHTS)[TREE + "feature_SN"].dtype == dtype
        loaded = load_checkpoint(folder)[0].state_dict()[TREE + "feature_SN"]
        assert torch.equal(loaded, feature_SN)
        assert loaded.dtype == torch.int32


def test_a_loaded_model_answers(folder: Path, model: MoETransformer, make_batch: MakeBatch) -> None:
    loaded, _ = load_checkpoint(folder)
    batch = make_batch((3, 1, 8))
    with torch.no_grad():
        (got, _), (expected, _) = (
            m({FRAUD.name: batch}).outputs[FRAUD.name] for m in (loaded, model)
        )
    assert not loaded.training
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(got[:, 1], expected[:, 1])  # the trees answer exactly


def test_the_manifest_says_what_was_saved(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.version == "fraud-7"
    assert manifest.tasks == (FRAUD.name,)
    assert manifest.config == PRESETS["tiny"].to_dict()
    assert manifest.metrics == {"ap": 0.5}
    assert manifest.sha256 == sha256_of(folder / WEIGHTS)


@pytest.mark.parametrize("position", [3, 500, -1])
def test_an_altered_byte_is_found(folder: Path, position: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"fraud/{WEIGHTS}: expected sha256 .*, got"):
        load_checkpoint(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: expected the weights .* no file"):
        load_checkpoint(folder)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def shorten(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][1:].clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks.1.moe.down"), "blocks.1.moe.down"),
        (drop(TREE + "threshold_SN"), r"missing \['threshold_SN'\]"),
        (shorten("final_norm"), "size mismatch for final_norm"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "stray"),
    ],
    ids=["missing tensor", "missing trees", "wrong shape", "unknown tensor"],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert str(caught.value).count(WEIGHTS) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tasks": ["fraud"]}', '{"tasks": 3}'])
def test_what_is_no_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: expected a checkpoint manifest"):
        load_checkpoint(folder)


def test_an_unknown_manifest_key_is_named(folder: Path) -> None:
    edit_manifest(folder, licence="none")
    with pytest.raises(CheckpointError, match="licence"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_modle": 32}, "d_modle"),
        ({"d_model": 0}, "d_model: expected above 0"),
        ({"d_model": "wide"}, "not supported"),
    ],
)
def test_an_impossible_configuration_is_named(
    folder: Path, config: dict[str, object], message: str
) -> None:
    edit_manifest(folder, config=config)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_an_unknown_task_is_named(folder: Path) -> None:
    edit_manifest(folder, tasks=["weather"])
    with pytest.raises(CheckpointError, match="weather"):
        load_checkpoint(folder)
