"""Whole layers for each node, by what it offers or by hand."""

from collections.abc import Sequence


def share_layers(layers: int, weights: Sequence[float], most: Sequence[int]) -> tuple[int, ...] | None:
    """Divide `layers` in proportion to `weights`, nobody getting more than `most` says.

    What the proportion leaves over goes to those with the largest remainder, the earlier one first. None where all of
    `most` together is too little, or nobody has any weight.
    """
    if sum(most) < layers or not any(weight > 0 for weight in weights):
        return None
    given = [0] * len(weights)
    left = layers
    open_: list[int] = [index for index, weight in enumerate(weights) if weight > 0 and most[index] > 0]
    while left and open_:
        total = sum(weights[index] for index in open_)
        exact = {index: left * weights[index] / total for index in open_}
        full = [index for index in open_ if given[index] + exact[index] >= most[index]]
        if full:
            for index in full:
                left -= most[index] - given[index]
                given[index] = most[index]
            open_ = [index for index in open_ if index not in full]
            continue
        whole = {index: int(exact[index]) for index in open_}
        rest = left - sum(whole.values())
        order = sorted(open_, key=lambda index: (whole[index] - exact[index], index))
        for place, index in enumerate(order):
            given[index] += whole[index] + (1 if place < rest else 0)
        left = 0
    return tuple(given) if left == 0 else None
