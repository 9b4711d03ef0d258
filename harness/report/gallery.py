"""How each figure of a suite is drawn, by its name in `figures`. Importing this imports matplotlib."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from harness.report import drawings, forests, heatmaps

DRAWINGS: dict[str, Callable[[Any], Figure]] = {
    "overview": drawings.draw_overview,
    "divergence": drawings.draw_divergence,
    "losses": forests.draw_losses,
    "decode": forests.draw_decode_speeds,
    "batch": forests.draw_batches,
    "depth": forests.draw_bands,
    "sensitivity": heatmaps.draw_sensitivity,
    "experts": heatmaps.draw_experts,
}
"""Each draws the dataclass that `figures.plotted_by_name` has for its name, inside `plots.style()`."""
