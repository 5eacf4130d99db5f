"""Small pictures made of characters: a bar for the context, a map for the experts' heat."""

import numpy as np

_SHADES, _ASCII_SHADES = " ░▒▓█", " .:*#"
_MOST_ROWS = 16


def bar(share: float, width: int) -> str:
    """`████░░░░`"""
    num_full = min(max(round(share * width), 0), width)
    return "█" * num_full + "░" * (width - num_full)


def heat_rows(heat: np.ndarray, width: int, is_ascii: bool = False) -> list[str]:
    """Lines of a map of `heat` (layers, experts): a row for some layers, experts from the hottest to the coldest.

    Experts are sorted within each layer, because their numbers mean nothing; so the picture shows how unevenly they are
    used.
    """
    assert heat.ndim == 2, heat.shape
    num_layers, num_experts = heat.shape
    if not heat.size or heat.max() <= 0:
        return ["no expert has been used yet"]
    shades = _ASCII_SHADES if is_ascii else _SHADES
    sorted_heat = -np.sort(-heat, axis=1)  # (layers, experts), hottest first
    groups = np.array_split(np.arange(num_layers), min(num_layers, _MOST_ROWS))
    columns = np.array_split(np.arange(num_experts), min(num_experts, width))
    top = np.log1p(sorted_heat.max())
    lines = []
    for rows in groups:
        cells = [np.log1p(sorted_heat[np.ix_(rows, column)].mean()) / top for column in columns]
        picture = "".join(shades[round(cell * (len(shades) - 1))] for cell in cells)
        lines.append(f"{rows[0]:>3} {picture}")
    share = sorted_heat[:, : max(num_experts // 10, 1)].sum() / sorted_heat.sum()
    return [
        *lines,
        f"    hottest … coldest of {num_experts} experts a layer; the first tenth got {100 * share:.0f} % of the use",
    ]
