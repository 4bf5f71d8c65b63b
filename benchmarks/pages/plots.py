"""Pictures that are the same whenever they are made of the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvcompress.errors import KVCompressError

INK: Final = "#222222"
GREY: Final = "#9a9a9a"
OURS: Final = ("#c1121f", "#6f0a13", "#f0717a")
_HOUSE: Final[dict[str, Any]] = {
    "svg.hashsalt": "kvcompress",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pyplot(plain: bool = False) -> Any:
    """matplotlib.pyplot, drawing to files.

    Args:
        plain: with matplotlib's own settings.

    Raises:
        KVCompressError: naming the extra to install where there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise KVCompressError(
            "pictures are drawn with matplotlib, which is not installed: "
            "pip install 'kvcompress[plots]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({} if plain else _HOUSE)
    return plt


def save(figure: Any, path: Path) -> None:
    """PNG and SVG without a date, so that the same results give the same files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    pyplot().close(figure)


def panels(count: int, most: int, size: tuple[float, float], beside: float, above: float) -> Any:
    """(figure, axes of each panel): `count` of them, at most so many in a line.

    Args:
        size: inches of a panel; `beside` and `above` are added to the whole.
    """
    columns = min(most, count)
    lines = -(-count // columns)
    whole = (size[0] * columns + beside, size[1] * lines + above)
    figure, grid = pyplot().subplots(
        lines, columns, figsize=whole, layout="constrained", squeeze=False
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])
