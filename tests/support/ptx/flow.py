"""Where the lanes of a warp that part at a branch run together again."""

from __future__ import annotations


def meeting_points(
    count: int, ends: dict[int, str], always: set[int], targets: list[int]
) -> list[int]:
    """The nearest instruction behind each branch or exit that every path from it reaches.

    `ends` has the branches and exits by their places, `always` those without a guard, `targets`
    where each branch leads; `count` stands for the end of the program.
    """
    starts = sorted({0, *(t for t in targets if t >= 0), *(i + 1 for i in ends if i + 1 < count)})
    number = {start: block for block, start in enumerate(starts)}
    lasts = [*(start - 1 for start in starts[1:]), count - 1]
    away = len(starts)  # the end of the program, as a block
    follows = []
    for last in lasts:
        after = {"bra": {number.get(targets[last])}, "exit": {away}}.get(ends.get(last), set())
        if last not in always and last + 1 < count:
            after = after | {number[last + 1]}
        follows.append(after or {away})
    behind = _post_dominators(follows)
    meets = [-1] * count
    for block, last in enumerate(lasts):
        if last in ends:
            others = [b for b in range(away + 1) if behind[block] >> b & 1 and b != block]
            nearest = max(others, key=lambda b: behind[b].bit_count())
            meets[last] = count if nearest == away else starts[nearest]
    return meets


def _post_dominators(follows: list[set[int]]) -> list[int]:
    """The blocks that every path from a block to the end goes through, as bits."""
    away = len(follows)
    everything = (1 << away + 1) - 1
    behind = [everything] * away + [1 << away]
    changed = True
    while changed:
        changed = False
        for block in reversed(range(away)):
            common = everything
            for other in follows[block]:
                common &= behind[other]
            common |= 1 << block
            changed |= common != behind[block]
            behind[block] = common
    return behind
