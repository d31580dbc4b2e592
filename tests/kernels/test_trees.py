import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Form, Impl
from kernels.trees import TreeEnsemble, tree_ensemble

NearCheck = Callable[[Tensor, Tensor], None]
FORMS = get_args(Form)


def draw(
    num_trees: int, depth: int, num_features: int, width: int, device: torch.device
) -> TreeEnsemble:
    nodes, leaves = 2**depth - 1, 2**depth
    ensemble = TreeEnsemble(
        torch.randint(0, num_features, (num_trees, nodes), dtype=torch.int32),
        torch.randn(num_trees, nodes),
        torch.rand(num_trees, nodes) < 0.5,
        torch.randn(num_trees, leaves) / max(num_trees, 1) ** 0.5,
        torch.randn(num_trees, leaves, width) / max(num_trees, 1) ** 0.5,
        torch.tensor(0.25),
    )
    return TreeEnsemble(*(field.to(device) for field in ensemble))


def draw_rows(num_rows: int, num_features: int, device: torch.device) -> Tensor:
    """Return rows of which a fifth of the values is missing."""
    x_NF = torch.randn(num_rows, num_features)
    return x_NF.masked_fill(torch.rand(num_rows, num_features) < 0.2, torch.nan).to(device)


def test_reference_is_the_formula(assert_near: NearCheck) -> None:
    ensemble = draw(5, 3, 4, 6, torch.device("cpu"))
    x_NF = draw_rows(20, 4, torch.device("cpu"))
    logit_N, embedding_NE = torch.full((20,), 0.25), torch.zeros(20, 6)
    for n, row in enumerate(x_NF.tolist()):
        for s in range(5):
            node = 0
            while node < 7:
                value = row[int(ensemble.feature_SN[s, node])]
                left = value < float(ensemble.threshold_SN[s, node])
                if math.isnan(value):
                    left = bool(ensemble.missing_left_SN[s, node])
                node = 2 * node + (1 if left else 2)
            logit_N[n] += ensemble.leaf_SL[s, node - 7]
            embedding_NE[n] += ensemble.leaf_embedding_SLE[s, node - 7]
    got = tree_ensemble(x_NF, ensemble, impl="reference")
    assert_near(got[0], logit_N)
    assert_near(got[1], embedding_NE)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("num_rows", "num_trees", "depth", "width"),
    [(0, 3, 2, 4), (3, 0, 1, 4), (7, 1, 1, 1), (37, 19, 3, 24), (33, 16, 4, 5)],
)
def test_forms_agree(
    impl: Impl,
    num_rows: int,
    num_trees: int,
    depth: int,
    width: int,
    device: torch.device,
    assert_near: NearCheck,
) -> None:
    ensemble = draw(num_trees, depth, 6, width, device)
    x_NF = draw_rows(num_rows, 6, device)
    want = tree_ensemble(x_NF, ensemble, impl="reference")
    for got, expected in zip(tree_ensemble(x_NF, ensemble, impl=impl), want, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, expected)


@pytest.mark.parametrize("impl", FORMS)
def test_a_value_at_the_threshold_goes_right(impl: Impl, device: torch.device) -> None:
    ensemble = draw(1, 1, 1, 1, device)
    ensemble.threshold_SN.fill_(0.5)
    x_NF = torch.tensor([[0.5], [0.49], [torch.inf], [-torch.inf]], device=device)
    logit_N, _ = tree_ensemble(x_NF, ensemble, impl=impl)
    left, right = (ensemble.leaf_SL[0] + ensemble.base).tolist()
    assert logit_N.tolist() == [right, left, right, left]


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("missing_left", [False, True])
def test_missing_values_go_where_the_node_says(
    impl: Impl, missing_left: bool, device: torch.device
) -> None:
    ensemble = draw(1, 1, 1, 1, device)
    ensemble.threshold_SN.fill_(torch.inf)  # as the filler nodes of a short tree
    ensemble.missing_left_SN.fill_(missing_left)
    logit_N, _ = tree_ensemble(torch.full((1, 1), torch.nan, device=device), ensemble, impl=impl)
    expected = ensemble.leaf_SL[0, 0 if missing_left else 1] + ensemble.base
    assert logit_N.item() == expected.item()


@pytest.mark.parametrize("impl", FORMS)
def test_columns_may_come_from_any_layout(
    impl: Impl, device: torch.device, assert_near: NearCheck
) -> None:
    ensemble, x_NF = draw(4, 2, 5, 3, device), draw_rows(9, 5, device)
    by_column = x_NF.T.contiguous().T
    want = tree_ensemble(x_NF, ensemble, impl=impl)
    for got, expected in zip(tree_ensemble(by_column, ensemble, impl=impl), want, strict=True):
        assert_near(got, expected)


def test_leaves_are_differentiable() -> None:
    ensemble = draw(3, 2, 5, 4, torch.device("cpu"))
    leaves = (ensemble.leaf_SL.requires_grad_(), ensemble.leaf_embedding_SLE.requires_grad_())
    logit_N, embedding_NE = tree_ensemble(draw_rows(8, 5, torch.device("cpu")), ensemble)
    by_leaf, by_embedding = torch.autograd.grad(logit_N.sum() + embedding_NE.sum(), leaves)
    assert by_leaf.sum(dim=1).tolist() == [8.0, 8.0, 8.0]  # each row has one leaf per tree
    assert torch.equal(by_embedding, by_leaf.unsqueeze(2).expand_as(by_embedding))


def test_leaf_count_that_is_no_power_of_two_is_refused() -> None:
    ensemble = draw(2, 2, 3, 1, torch.device("cpu"))
    shorter = ensemble._replace(
        feature_SN=ensemble.feature_SN[:, :2].contiguous(),
        threshold_SN=ensemble.threshold_SN[:, :2].contiguous(),
        missing_left_SN=ensemble.missing_left_SN[:, :2].contiguous(),
        leaf_SL=ensemble.leaf_SL[:, :3].contiguous(),
        leaf_embedding_SLE=ensemble.leaf_embedding_SLE[:, :3].contiguous(),
    )
    with pytest.raises(ValueError, match="power of two"):
        tree_ensemble(torch.zeros(1, 3), shorter)


def test_many_rows_are_walked_by_blocks_alone(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, assert_near: NearCheck
) -> None:
    monkeypatch.setattr("kernels._triton.trees.MANY_ROWS", 100)
    ensemble, x_NF = draw(5, 2, 6, 130, device), draw_rows(131, 6, device)
    x_NF[7] = torch.nan
    want = tree_ensemble(x_NF, ensemble, impl="reference")
    got = tree_ensemble(x_NF, ensemble, impl="triton")
    again = tree_ensemble(x_NF.T.contiguous().T, ensemble, impl="triton")
    for got_N, again_N, want_N in zip(got, again, want, strict=True):
        assert_near(got_N, want_N)
        assert torch.equal(got_N, again_N)


@pytest.mark.parametrize("impl", FORMS)
def test_a_row_does_not_depend_on_its_place(impl: Impl, device: torch.device) -> None:
    ensemble, x_NF = draw(17, 2, 6, 5, device), draw_rows(37, 6, device)
    order_N = torch.randperm(37, device=device)
    plain = tree_ensemble(x_NF, ensemble, impl=impl)
    moved = tree_ensemble(x_NF[order_N], ensemble, impl=impl)
    for got, want in zip(moved, plain, strict=True):
        assert torch.equal(got, want[order_N])
