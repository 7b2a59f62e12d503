"""Figures of a study."""

import dataclasses
from collections.abc import Callable

from matplotlib.figure import Figure

from sos.experiments.figures.branches import draw_branches
from sos.experiments.figures.costs import draw_costs
from sos.experiments.figures.layer_kinds import draw_layer_kinds
from sos.experiments.figures.layerwise import draw_layerwise
from sos.experiments.figures.layerwise_map import draw_layerwise_map
from sos.experiments.figures.mask_churn import draw_mask_churn
from sos.experiments.figures.mask_overlap import draw_mask_overlap
from sos.experiments.figures.output import save_png, svg
from sos.experiments.figures.study import Study
from sos.experiments.figures.tradeoff import draw_tradeoff
from sos.experiments.figures.training_curves import draw_training_curves
from sos.experiments.scores import ScoreMetric

__all__ = ["FIGURES", "FigureSpec", "Study", "save_png", "svg"]


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """A figure that can be drawn of a study.

    Attributes:
        name: Name of its file, without suffix.
        title: Title in reports, in which "{Score}" is replaced by the score.
        caption: Explanation in reports, a sentence or two, with "{score}".
        draw: Returns the figure; None if the study has nothing to show in it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Study], Figure | None]

    def named(self, score: ScoreMetric) -> "FigureSpec":
        """Returns the figure with the name of a score in title and caption.

        Args:
            score: The score.
        """
        scales = "Density has a log scale"
        if score.is_fraction:
            scales = "Density and error have log scales"
        names = {
            "score": score.label,
            "Score": score.title,
            "log_scales": scales,
        }
        return dataclasses.replace(
            self,
            title=self.title.format(**names),
            caption=self.caption.format(**names),
        )


#: All figures, in the order of a report.
FIGURES = (
    FigureSpec(
        "tradeoff",
        "{Score} against sparsity",
        "{log_scales}. Curves join the means over seeds; "
        "bars, and the band of dense models, extend from the lowest to the "
        "highest value.",
        draw_tradeoff,
    ),
    FigureSpec(
        "branches",
        "Is the mask enough?",
        "Networks that are trained with the masks of another run, the trunk. "
        "Each trunk has a plot, with the axes of {score} against sparsity. A "
        "branch on the line of its trunk does as well without the weights that "
        "pruning found.",
        draw_branches,
    ),
    FigureSpec(
        "layerwise",
        "Sparsity of each layer",
        "Of each technique the runs nearest to one overall sparsity, with the "
        "layers in the order of the network.",
        draw_layerwise,
    ),
    FigureSpec(
        "layerwise_map",
        "Sparsity of each layer at all sparsities",
        "Each column is the mean over seeds at one overall sparsity. Colours "
        "follow the density on a log scale; numbers are percentages.",
        draw_layerwise_map,
    ),
    FigureSpec(
        "layer_kinds",
        "Sparsity of each kind of layer",
        "Each plot has one kind of layer, and its part of the weights. A curve "
        "above the diagonal prunes this kind more than the network as a whole. "
        "Both axes have a log scale of the density.",
        draw_layer_kinds,
    ),
    FigureSpec(
        "training_curves",
        "Training",
        "Means over the loops of training, and evaluations, of every seed; of "
        "dense models, of one. The network becomes sparser in the shaded "
        "steps: those of the pruning schedule, or of the growth of the "
        "penalty.",
        draw_training_curves,
    ),
    FigureSpec(
        "mask_churn",
        "Changes of masks",
        "Above, the fraction of mask elements that each update changes; dotted "
        "is what the schedule alone needs, if no pruned element comes back. "
        "Below, the fraction of the kept elements that come back in the "
        "update.",
        draw_mask_churn,
    ),
    FigureSpec(
        "mask_overlap",
        "Overlap of masks",
        "Intersection over union of the kept elements of two runs (below the "
        "diagonal), and of two random masks with the same number of kept "
        "elements in each weight (above it).",
        draw_mask_overlap,
    ),
    FigureSpec(
        "costs",
        "{Score} against multiply-adds",
        "Inference counts the weights that are left. Training counts each step "
        "as three dense forward passes of its batch, because masks save "
        "nothing there, twice as many for variational dropout, which computes "
        "means and variances, and for a branch also the training of its trunk. "
        "Branches of different trunks are different lines. The plots have "
        "different ranges of {score}.",
        draw_costs,
    ),
)
