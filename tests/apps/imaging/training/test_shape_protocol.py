"""The protocol of AdrenalMNIST3D: every row, seeds that are not trained again, refusals."""

import argparse
from pathlib import Path

import pytest

from apps.imaging.training import shape_protocol
from apps.imaging.training.adrenal import ShapeSettings
from apps.imaging.training.parts import Parts
from apps.imaging.training.shape_protocol import evaluate_adrenal
from core_model.checkpoint import load_checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_maps")
def test_every_row_is_reported_and_a_finished_seed_is_not_trained_again(
    adrenal_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ShapeSettings(epochs=3, batch_size=8, peak_lr=4e-3, average_decay=0.5)
    monkeypatch.setattr(shape_protocol, "ShapeSettings", lambda: settings)
    args = argparse.Namespace(data=[adrenal_file], seeds=2, preset="tiny", device="cpu", loaders=0)
    lines: list[str] = []
    report = evaluate_adrenal(args, Parts(tmp_path / "work"), "a command", lines.append)
    assert [(row["size"], row["flips"]) for row in report["rows"]] == [(28, False), (28, True)]
    assert report["auc_mean"] in [row["auc_mean"] for row in report["rows"]]
    assert all(row["majority"] == 0.5 and len(row["per_seed"]) == 2 for row in report["rows"])
    assert len(lines) == 2
    _, manifest = load_checkpoint(tmp_path / "work/adrenalmnist3d-1")
    assert manifest.command == "a command"

    again = evaluate_adrenal(args, Parts(tmp_path / "work"), "a command", lines.append)
    assert again == report
    assert len(lines) == 2
