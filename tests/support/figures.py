"""Reads what figures show from matplotlib's objects."""

import dataclasses
import itertools
import math

import matplotlib.colors
import numpy as np

from sos.experiments.runs import WeightSparsity

LAYERS = {"conv1/kernel": 144, "hidden/kernel": 131_072, "logits/kernel": 1280}


def weights(sparsities, layers=LAYERS):
    """The weights of a result, of one sparsity each."""
    return tuple(
        WeightSparsity(path=path, size=size, sparsity=sparsity)
        for (path, size), sparsity in zip(
            layers.items(), sparsities, strict=True
        )
    )


def replaced(run, **changes):
    """A run with other fields of its result."""
    result = dataclasses.replace(run.result, **changes)
    return dataclasses.replace(run, result=result)


def labelled_lines(axes):
    """The lines with a label, by label."""
    return {
        line.get_label(): line
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def error_bars(axes, colour):
    """Beginnings and ends of the error bars of a colour, of shape (n, 2, 2)."""
    segments = []
    for collection in axes.collections:
        found = matplotlib.colors.to_hex(collection.get_edgecolor()[0])
        if found.upper() == colour.upper():
            segments += collection.get_segments()
    return np.array(segments)


def texts(figure):
    """The texts that a figure shows, with their boxes in pixels."""
    figure.canvas.draw()
    shown = [*figure.texts, *(_legend_texts(figure.legends))]
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        shown += [axes.title, axes._left_title, *axes.texts]
        shown += _legend_texts(filter(None, [axes.get_legend()]))
        for axis in (axes.xaxis, axes.yaxis):
            shown.append(axis.label)
            low, high = sorted(axis.get_view_interval())
            places = axis.get_ticklocs()
            shown += [
                tick.label1 if tick.label1.get_visible() else tick.label2
                for place, tick in zip(
                    places, axis.get_major_ticks(len(places)), strict=True
                )
                if low <= place <= high
            ]
    return [
        (text, text.get_window_extent())
        for text in shown
        if text.get_visible() and text.get_text()
    ]


def _legend_texts(legends):
    for legend in legends:
        yield from (legend.get_title(), *legend.get_texts())


def check_texts(figure):
    """Checks that texts are inside of the figure and none overlaps another."""
    boxes = texts(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1, text
        assert box.x1 < width + 1 and box.y1 < height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        if one.get_rotation() % 90 and other.get_rotation() % 90:
            # Slanted ones end beside each other, more than a line apart.
            ends = (a.x1, a.y1), (b.x1, b.y1)
            assert math.dist(*ends) > one.get_fontsize() / 72 * figure.dpi
            continue
        overlap = (
            min(a.x1, b.x1) - max(a.x0, b.x0),
            min(a.y1, b.y1) - max(a.y0, b.y0),
        )
        assert min(overlap) < 1, f"{one} overlaps {other}"
