"""Shape of the shared core: one frozen configuration and its presets."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Sizes of the block stack; adapters and heads derive theirs from it.

    What starts with a default of 0 or 1 is plain until it is set: experts in every block and in
    one group, queries, keys and values as full matrices.

    Args:
        d_model: Width of a token.
        num_layers: Blocks.
        num_heads: Attention heads; divides ``d_model``.
        num_experts: Routed experts per block.
        num_chosen: Routed experts per token (top-k).
        d_expert: Hidden width of a routed expert.
        d_shared: Hidden width of the shared expert.
        rms_eps: Added to the mean square before the root.
        num_groups: Groups of equally many experts.
        chosen_groups: Groups that the experts of a token come from.
        routed_scale: Factor of what the routed experts give together.
        dense_layers: First blocks, which have no routed experts.
        d_dense: Hidden width of their feed-forward.
        q_rank: Width that queries are projected through.
        kv_rank: Width that keys and values are projected through.
        d_nope: Part of a head's query and key that knows no position.
        d_rope: Part that is rotated by position, even; the keys' is one for all heads.
        d_value: Width of a head's value, at most that of its query.
    """

    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    num_chosen: int = 2
    d_expert: int = 192
    d_shared: int = 192
    rms_eps: float = 1e-6
    num_groups: int = 1
    chosen_groups: int = 1
    routed_scale: float = 1.0
    dense_layers: int = 0
    d_dense: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    d_nope: int = 0
    d_rope: int = 0
    d_value: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, may_be_zero = getattr(self, field.name), field.default == 0
            if value < 0 or (value == 0 and not may_be_zero):
                message = (
                    f"{field.name}: expected {'from' if may_be_zero else 'above'} 0, got {value}"
                )
                raise ValueError(message)
        for is_met, rule in self._rules():
            if not is_met:
                raise ValueError(rule)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Yield what must hold between fields: whether it does, and the error if not."""
        heads, experts, chosen = self.num_heads, self.num_experts, self.num_chosen
        yield self.d_model % heads == 0, f"num_heads {heads} must divide d_model {self.d_model}"
        yield chosen <= experts, f"num_chosen {chosen} exceeds num_experts {experts}"
        groups, open_groups = self.num_groups, self.chosen_groups
        size, rest = divmod(experts, groups)
        is_cut = groups == 1 or (rest == 0 and size >= 2)
        yield is_cut, f"num_groups {groups} must cut num_experts {experts} into equal ones from 2"
        yield open_groups <= groups, f"chosen_groups {open_groups} exceeds num_groups {groups}"
        num_open = open_groups * size
        yield chosen <= num_open, f"num_chosen {chosen} exceeds the {num_open} of chosen_groups"
        dense, layers = self.dense_layers, self.num_layers
        yield dense < layers, f"dense_layers {dense} must leave some of num_layers {layers}"
        pair = (dense, self.d_dense)
        yield (
            all(pair) or not any(pair),
            f"dense_layers, d_dense: expected both or none, got {pair}",
        )
        parts = (self.q_rank, self.kv_rank, self.d_nope, self.d_rope, self.d_value)
        names = "q_rank, kv_rank, d_nope, d_rope, d_value"
        yield all(parts) or not any(parts), f"{names}: expected all or none, got {parts}"
        yield self.d_rope % 2 == 0, f"d_rope: expected an even width, got {self.d_rope}"
        width, value = self.d_head, self.d_value
        yield value <= width, f"d_value {value} exceeds d_nope + d_rope {width}"

    @property
    def is_low_rank(self) -> bool:
        """Whether queries, keys and values are projected through fewer dimensions."""
        return self.kv_rank > 0

    @property
    def d_head(self) -> int:
        """Width of the query of one attention head."""
        return self.d_nope + self.d_rope if self.is_low_rank else self.d_model // self.num_heads

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routed experts."""
        return self.num_layers - self.dense_layers

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
    "deepseek-v3": MoEConfig(  # arXiv:2412.19437, section 4.2, without the MTP module
        d_model=7168,
        num_layers=61,
        num_heads=128,
        num_experts=256,
        num_chosen=8,
        d_expert=2048,
        d_shared=2048,
        num_groups=8,
        chosen_groups=4,
        routed_scale=2.5,
        dense_layers=3,
        d_dense=18432,
        q_rank=1536,
        kv_rank=512,
        d_nope=128,
        d_rope=64,
        d_value=128,
    ),
}
