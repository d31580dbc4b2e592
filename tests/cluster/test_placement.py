"""Workers go where the fewest are, and not where nothing will stay."""

from cluster.placement import Node, choose_node

HEAD, B, C = Node("a-head", 0.0), Node("b", 4.0), Node("c", 4.0)


def test_the_node_with_the_fewest_workers_is_chosen() -> None:
    taken: list[str] = []
    for _ in range(4):
        taken.append(str(choose_node([B, C], taken)))
    assert taken == ["b", "c", "b", "c"]


def test_a_head_without_cpus_is_kept_free() -> None:
    assert choose_node([HEAD, B], ["b"] * 5) == "b"


def test_a_node_that_is_drained_gets_nothing_while_there_is_another() -> None:
    assert choose_node([B, C], ["c"], avoided={"b"}) == "c"
    assert choose_node([HEAD, B], [], avoided={"b"}) == "a-head"


def test_the_last_node_is_used_whatever_it_is() -> None:
    assert choose_node([HEAD], []) == "a-head"
    assert choose_node([B], [], avoided={"b"}) == "b"
    assert choose_node([], []) is None
