"""Shape of the shared core: one frozen configuration and its presets."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Sizes of the block stack; adapters and heads derive theirs from it.

    Args:
        d_model: Width of a token.
        num_layers: Blocks.
        num_heads: Attention heads; divides ``d_model``.
        num_experts: Routed experts per block.
        num_chosen: Routed experts per token (top-k).
        d_expert: Hidden width of a routed expert.
        d_shared: Hidden width of the shared expert.
        rms_eps: Added to the mean square before the root.
    """

    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    num_chosen: int = 2
    d_expert: int = 192
    d_shared: int = 192
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                message = f"{field.name}: expected above 0, got {getattr(self, field.name)}"
                raise ValueError(message)
        if self.d_model % self.num_heads:
            message = f"num_heads {self.num_heads} must divide d_model {self.d_model}"
            raise ValueError(message)
        if self.num_chosen > self.num_experts:
            message = f"num_chosen {self.num_chosen} exceeds num_experts {self.num_experts}"
            raise ValueError(message)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as a manifest stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a manifest's mapping.

        Raises:
            ValueError: A key is unknown or a value does not fit.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            message = f"config: expected only known keys, got {sorted(unknown)}"
            raise ValueError(message)
        return cls(**values)


PRESETS: Mapping[str, MoEConfig] = {
    "tiny": MoEConfig(
        d_model=32, num_layers=2, num_heads=2, num_experts=4, d_expert=32, d_shared=32
    ),
    "small": MoEConfig(num_layers=2, num_experts=8, d_expert=64, d_shared=64),
    "base": MoEConfig(),
    "large": MoEConfig(
        d_model=1024,
        num_layers=16,
        num_heads=16,
        num_experts=64,
        num_chosen=4,
        d_expert=768,
        d_shared=768,
    ),
}
