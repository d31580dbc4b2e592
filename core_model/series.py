"""Time-series adapter: a machine at one moment as tokens, with a tree expert beside them.

    span 1   state, patches and events    the sequence experts' own opinion, blind to the tree
    span 2   state, tree                  what the gate between the two reads

A patch is a few moments of all sensors; what was not measured is a mask beside the value.
The state token is made of the context.  Trees that answer several questions are one
ensemble whose leaves are embedded in the question that they belong to.

Legend: B sequences, R rows, C context columns, D model, V values of a patch, E tree answers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core_model.config import MoEConfig
from core_model.packing import Encoded, RaggedBatch, offsets_from_lengths, segment_ids
from core_model.series_tasks import (
    COLUMN_AGE,
    COLUMN_AHEAD,
    COLUMN_CODE,
    COLUMN_KIND,
    EXTRA_TOKENS,
    FIRST_VALUE,
    SeriesShape,
)
from core_model.trees import embed_answers, empty_ensemble, ensemble_from_xgboost
from kernels.trees import TreeEnsemble, tree_ensemble

KNOTS = (3.0, 6.0, 12.0, 24.0, 36.0, 48.0, 72.0, 168.0, 360.0, 720.0)  # hours or cycles
STEP_SHARE = 0.1  # a soft step at a knot is a tenth of it wide
REACH = 5.0  # standardised inputs are cut here
DROPOUT = 0.1
HIDDEN_CONTEXT = 0.2  # share of context columns that training hides, as if unknown


def soft_steps(x: Tensor, knots: Tensor) -> Tensor:
    """Return which knots x has passed, with unknown x apart, [..., 2 + knots]."""
    known = ~x.isnan()
    filled = torch.nan_to_num(x).unsqueeze(-1)
    steps = torch.sigmoid((filled - knots) / (STEP_SHARE * knots))
    scaled = torch.log1p(filled.clamp(min=0.0)) / 4.0
    parts = torch.cat([scaled, steps], dim=-1) * known.unsqueeze(-1)
    return torch.cat([parts, known.unsqueeze(-1).float()], dim=-1)


def ensemble_of_answers(model: Mapping[str, Any], num_features: int) -> TreeEnsemble:
    """Return a booster of several answers as arrays; a leaf's embedding is its answer.

    Args:
        model: Parsed JSON of an XGBoost model; one or several targets, from a base
            score of margin 0.
        num_features: Width of the rows it was trained on.

    Returns:
        Trees whose summed embedding is the margin of each target.
    """
    learner = model["learner"]
    no_base = {"learner_model_param": {"base_score": "0.5"}}  # its logit is 0
    plain = ensemble_from_xgboost({"learner": {**learner, **no_base}}, num_features)
    answer_S = torch.tensor(learner["gradient_booster"]["model"]["tree_info"], dtype=torch.int64)
    widths = learner["learner_model_param"]
    num_answers = max(int(widths["num_class"]), int(widths["num_target"]))
    answer_SE = functional.one_hot(answer_S, num_answers)
    return plain._replace(leaf_embedding_SLE=embed_answers(plain.leaf_SL, answer_SE))


class SeriesAdapter(nn.Module):
    """Ragged series with context -> a state token, their rows, and state and tree side by side.

    ``extras["context"]`` [B, C] is required.  In training ``extras["tree"]`` [B, E] replaces
    the ensemble's own answer, because trees must not be trusted on rows they were fitted on.

    Args:
        config: Of the shared blocks.
        shape: Widths of the task.
    """

    context_mean: Tensor
    context_std: Tensor
    value_mean: Tensor
    value_std: Tensor
    knots: Tensor

    def __init__(self, config: MoEConfig, shape: SeriesShape) -> None:
        super().__init__()
        d = config.d_model
        self.shape = shape
        num_values = shape.patch * shape.channels
        self.register_buffer("context_mean", torch.zeros(shape.context))
        self.register_buffer("context_std", torch.ones(shape.context))
        self.register_buffer("value_mean", torch.zeros(num_values))
        self.register_buffer("value_std", torch.ones(num_values))
        self.register_buffer("knots", torch.tensor(KNOTS), persistent=False)
        self.set_ensemble(empty_ensemble(shape.tree))
        num_steps = len(KNOTS) + 2
        self.context = nn.Sequential(
            nn.Linear(2 * shape.context, d), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(d, d)
        )
        self.rows = nn.Sequential(
            nn.Linear(2 * num_values + 2 * num_steps, d), nn.GELU(), nn.Linear(d, d)
        )
        self.code = nn.Embedding(1 + shape.codes, d)  # 0 for patches
        self.tree = nn.Sequential(nn.Linear(shape.tree, d), nn.GELU(), nn.Linear(d, d))
        self.kind = nn.Parameter(torch.randn(EXTRA_TOKENS, d) * 0.5)

    @property
    def ensemble(self) -> TreeEnsemble:
        """The installed tree expert."""
        return TreeEnsemble(*(getattr(self, f"tree_{name}") for name in TreeEnsemble._fields))

    def set_ensemble(self, ensemble: TreeEnsemble) -> None:
        """Install the tree expert."""
        for name, value in ensemble._asdict().items():
            self.register_buffer(f"tree_{name}", value)

    @torch.no_grad()
    def fit_scaling(self, batch: RaggedBatch) -> None:
        """Take mean and deviation of context and values, unknown ones left out."""
        is_patch = batch.features[:, COLUMN_KIND] == 0
        for name, values in (
            ("context", batch.extras["context"]),
            ("value", batch.features[is_patch, FIRST_VALUE:]),
        ):
            mean = torch.nan_to_num(torch.nanmean(values, dim=0))
            std = torch.nanmean((values - mean) ** 2, dim=0).sqrt()
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.nan_to_num(std, nan=1.0).clamp(min=1e-3))

    def forward(self, batch: RaggedBatch) -> Encoded:
        """Return the tokens of all series, and the trees' answers beside them."""
        context_BC = batch.extras["context"]
        tree_BE = batch.extras.get("tree")
        if tree_BE is None:
            tree_BE = self.answer(context_BC)
        seen_BC = hide(context_BC, HIDDEN_CONTEXT) if self.training else context_BC
        state_BD = self.context(_standardise(seen_BC, self.context_mean, self.context_std))
        rows_RD = self.encode_rows(batch.features)
        beside_B2D = torch.stack([state_BD, self.tree(tree_BE)], dim=1) + self.kind[1:]
        return pack_series(state_BD + self.kind[0], rows_RD, beside_B2D, batch.cu_seqlens, tree_BE)

    def answer(self, context_BC: Tensor) -> Tensor:
        """Return the trees' answers [B, E]; zeros before trees are installed."""
        if self.ensemble.leaf_SL.shape[0] == 0:
            return context_BC.new_zeros(context_BC.shape[0], self.shape.tree)
        rows_NF = self.tree_rows(context_BC)
        _, answers = tree_ensemble(rows_NF, self.ensemble)
        return answers.reshape(context_BC.shape[0], self.shape.tree)

    def tree_rows(self, context_BC: Tensor) -> Tensor:
        """Return what the trees read; one row per sequence, or several asked in turn."""
        return context_BC

    def encode_rows(self, rows_RD: Tensor) -> Tensor:
        """Embed patches and events, [R, D]."""
        values = _standardise(rows_RD[:, FIRST_VALUE:], self.value_mean, self.value_std)
        when = soft_steps(rows_RD[:, [COLUMN_AGE, COLUMN_AHEAD]], self.knots).flatten(1)
        is_event = rows_RD[:, COLUMN_KIND] > 0
        code = torch.where(is_event, rows_RD[:, COLUMN_CODE].long() + 1, 0)
        encoded: Tensor = self.rows(torch.cat([values, when], dim=1)) + self.code(code)
        return encoded


def hide(x: Tensor, share: float) -> Tensor:
    """Return x with a random share of its entries unknown."""
    return torch.where(torch.rand_like(x) < share, torch.nan, x)


def _standardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return standardised values, 0 where unknown, and which are known, side by side."""
    scaled = ((x - mean) / std).clamp(-REACH, REACH)
    return torch.cat([torch.nan_to_num(scaled), (~scaled.isnan()).float()], dim=1)


def pack_series(
    state_BD: Tensor, rows_RD: Tensor, beside_B2D: Tensor, cu_rows: Tensor, tree_BE: Tensor
) -> Encoded:
    """Lay each series' tokens end to end: state and rows in one span, state and tree in another."""
    num, lengths_B = state_BD.shape[0], cu_rows[1:] - cu_rows[:-1]
    spans = torch.stack([lengths_B + 1, torch.full_like(lengths_B, EXTRA_TOKENS - 1)], dim=1)
    cu_spans = offsets_from_lengths(spans.flatten())
    cu_tokens = cu_spans[::2].contiguous()
    first_B = cu_tokens[:-1].long()
    rows_R = torch.arange(rows_RD.shape[0], device=rows_RD.device)
    sequence_R = segment_ids(cu_rows, rows_RD.shape[0])
    spot_R = rows_R + 1 + sequence_R * EXTRA_TOKENS
    beside_B = cu_spans[1::2].long()
    tokens_TD = state_BD.new_empty(rows_RD.shape[0] + num * EXTRA_TOKENS, state_BD.shape[1])
    spots = torch.cat([first_B, spot_R, beside_B, beside_B + 1])
    parts = torch.cat([state_BD, rows_RD, beside_B2D[:, 0], beside_B2D[:, 1]])
    tokens_TD = tokens_TD.index_copy(0, spots, parts)
    return Encoded(tokens_TD, cu_tokens, cu_spans, {"tree": tree_BE, "beside": beside_B})
