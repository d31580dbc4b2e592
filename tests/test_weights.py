"""What ships with the code stays small."""

from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"
MOST_BYTES = 16_000_000  # 16 MB


def test_all_weights_together_stay_within_their_bound() -> None:
    weights = [*MODELS.rglob("*.safetensors"), *MODELS.rglob("*.onnx")]
    assert weights
    assert sum(path.stat().st_size for path in weights) <= MOST_BYTES
