"""Which rollouts belong together: the order every decision over groups is taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def group_positions(group_index_B: Tensor, together: bool = False) -> list[list[int]]:
    """Positions of each group's rollouts, groups by rising index; ``together``: all of them in one list.

    Ties between rollouts are broken by this order, so it must not depend on how the groups are spread over
    ranks: group indices are global, and the rollouts of a group keep their order.
    """
    groups: dict[int, list[int]] = {}
    for position, group in enumerate(group_index_B.tolist()):
        groups.setdefault(group, []).append(position)
    ordered = [groups[group] for group in sorted(groups)]
    return [[position for group in ordered for position in group]] if together else ordered
