"""Figures as pictures."""

from pathlib import Path
from typing import Any

from vidlada.errors import InputError


def new_plot(path: Path) -> None:
    """See that a plot can be written before anything is measured.

    Raises:
        InputError: matplotlib is missing, the file exists, or its kind is unknown.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise InputError("plots need matplotlib; install vidlada[plot]") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise InputError(f"{path}: plots are written as {', '.join(sorted(known))}, not {path.suffix or 'nameless'}")
    if path.exists():
        raise InputError(f"{path} exists; choose another file")


def decoding_plot(figures: dict[str, Any], path: Path) -> None:
    """Draw how many times faster than full recompute every cache of `decoding_figures` is."""
    from matplotlib.figure import Figure

    caches = list(dict.fromkeys(row["cache"] for row in figures["rows"]))
    paces = list(dict.fromkeys(row["pace"] for row in figures["rows"]))
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(caches) * len(paces)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(paces)
    for number, pace in enumerate(paces):
        faster = {row["cache"]: row["times_faster"] for row in figures["rows"] if row["pace"] == pace}
        places = [place + number * height for place in range(len(caches))]
        bars = axes.barh(places, [faster[cache] for cache in caches], height, label=f"{pace} a step")
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks([place + height * (len(paces) - 1) / 2 for place in range(len(caches))], caches)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times faster than full recompute at one token a step")
    axes.set_title(f"{figures['size']}, {figures['visual_tokens']} visual tokens, {figures['machine']}", fontsize=9)
    axes.legend()
    figure.savefig(path)
