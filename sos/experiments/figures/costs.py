"""Scores against the cost of inference and of training."""

import dataclasses

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sos
from sos.experiments import config as config_lib
from sos.experiments.figures.curves import Curve, seeds_caption
from sos.experiments.figures.score_axes import (
    Position,
    draw_dense,
    draw_scores,
    drawable,
    score_axis,
    score_axis_label,
    widen_score_axis,
)
from sos.experiments.figures.study import Study
from sos.experiments.figures.style import (
    STYLE,
    new_grid,
    set_least_range,
    share_legend,
)
from sos.experiments.results import FinishedRun
from sos.experiments.scores import ScoreMetric

# A training step computes outputs, gradients of inputs, gradients of weights.
_PRODUCTS = 3


def draw_costs(study: Study) -> Figure | None:
    """Draws scores against multiply-adds of inference and of training.

    The plot of inference has all sparsities, that of training the runs of each
    label, and of each trunk, whose sparsity is nearest to
    `study.layerwise_sparsity`. As these are close together, it has its own
    range of scores.

    Args:
        study: The study.

    Returns:
        The figure; None if no run has multiply-adds.
    """
    # A line does not join branches of different trunks.
    curves = [own for curve in study.curves for own in curve.by_trunk()]
    inference = _drawable(curves, inference_cost)
    nearest = [
        curve if curve.dense else curve.nearest(study.layerwise_sparsity)
        for curve in curves
    ]
    training = _drawable(nearest, training_cost)
    if not inference and not training:
        return None
    with matplotlib.rc_context(STYLE):
        figure, ((left, right),) = new_grid(8.8, 3.9, 1, 2)
        for axes, drawn, position in (
            (left, inference, inference_cost),
            (right, training, training_cost),
        ):
            _draw(axes, drawn, position, study.score)
        left.set_ylabel(score_axis_label(study.score))
        left.set_xlabel("Multiply-adds of one example in evaluation")
        right.set_xlabel(
            "Multiply-adds of training, at about "
            f"{100 * study.layerwise_sparsity:.4g}% sparsity"
        )
        share_legend(figure, seeds_caption([*inference, *training]))
    return figure


def _drawable(curves: list[Curve], position: Position) -> list[Curve]:
    return [c for curve in curves if (c := drawable(curve, position))]


def _draw(
    axes: Axes, curves: list[Curve], position: Position, score: ScoreMetric
) -> None:
    axes.set_xscale("log")
    score_axis(axes, score)
    for curve in curves:
        if curve.dense:
            draw_dense(axes, curve)
            # Its place, besides the line for comparison.
            style = dataclasses.replace(curve.style, marker="8")
            curve = dataclasses.replace(curve, label="_", style=style)
        draw_scores(axes, curve, position)
    widen_score_axis(axes, score)
    # At least two of the ticks.
    set_least_range(axes, "x", 5)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def inference_cost(run: FinishedRun) -> float | None:
    """Returns the multiply-adds of one example with the weights that are left.

    Args:
        run: The run.

    Returns:
        The number; None if it is not known, or no weights are left.
    """
    return run.result.multiply_adds or None


def training_cost(run: FinishedRun) -> float | None:
    """Returns the multiply-adds of training a run, and the runs before it.

    Masks save nothing in training. Each step costs three times the dense
    forward pass of its batch: outputs, gradients of inputs and gradients of
    weights; for techniques that compute several products, such as variational
    dropout, as many times more. A branch needs the masks of its trunk, whose
    training is added.

    Args:
        run: The run.

    Returns:
        The number; None if it is not known for the run or one before it.
    """
    config, per_example = run.config, run.result.dense_multiply_adds
    parent = 0.0
    if config["parent"] is not None:
        parent = run.parent and training_cost(run.parent)
    if not per_example or parent is None:
        return None
    # Runs of older versions have no such entry.
    first = config_lib.first_step({"branch": {"name": None}, **config})
    steps = run.result.step - first
    technique = sos.extend.techniques().get(run.technique)
    products = technique.training_products if technique else 1
    return parent + (
        steps * config["batch_size"] * _PRODUCTS * products * per_example
    )
