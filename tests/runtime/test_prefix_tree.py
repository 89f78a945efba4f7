"""The tree of the prefix cache, by itself."""

from __future__ import annotations

from tokenspeed_plan.runtime.cache.prefix_tree import PrefixTree
from tokenspeed_plan.runtime.cache.ref_counts import SharedSlots


def test_what_is_freed_ends_where_others_hold_pages_or_go_on() -> None:
    pages = SharedSlots(range(5))
    tree, held = PrefixTree(b"seed", pages), pages.take_some(3)
    nodes = [tree.root]
    for number, page in enumerate(held):
        nodes.append(tree.insert_page(nodes[-1], bytes([number]) * 8, (number,), page))
    assert tree.num_freed(nodes[3]) == 0  # somebody holds all of them
    pages.drop_all(held[1:])
    assert tree.num_freed(nodes[3]) == 2
    pages.drop_all(held[:1])
    assert tree.num_freed(nodes[3]) == 3
    assert tree.num_freed(nodes[2]) == 0  # the last page needs it
    other = tree.insert_tail(nodes[1], (9,), pages.take())
    pages.drop(other.page)
    assert tree.num_freed(nodes[3]) == 2
    assert tree.num_freed(other) == 1


def test_an_answer_proves_the_tails_that_its_sequence_began_with() -> None:
    pages = SharedSlots(range(3))
    tree = PrefixTree(b"seed", pages)
    node = tree.insert_page(tree.root, b"first", (1, 2), pages.take())
    own, other = (tree.insert_tail(node, (token,), pages.take()) for token in (3, 4))
    node.prove((1, 2, 3))
    assert (node.proven, own.proven, other.proven) == (True, True, False)
    node.prove((1, 2, 4))
    assert own.proven
    assert other.proven
