"""What the engine tells of one host loop or of one evaluation."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The figures of one host loop of training, or of one evaluation.

    Attributes:
        step: Number of optimizer steps done.
        total_steps: Number of optimizer steps of the whole training.
        kind: "train" for a host loop, "eval" for an evaluation.
        metrics: Means over the steps of the loop or over the evaluation set,
            by name, such as `loss` and `accuracy`.
        learning_rate: That of the step that comes next.
        sparsity: Fraction of zeros in all sparse weights together; None for a
            dense model.
        penalty: Sum of the techniques' penalties, as added to the loss.
        weight_sparsity: Fraction of zeros in each sparse weight, by its path.
        weight_penalty: The penalty of each weight that has one, by its path.
        examples_per_second: Examples of all replicas in a second.
        seconds: Duration of the loop or evaluation.
        seconds_left: An estimate of the time until training ends.
    """

    step: int
    total_steps: int
    kind: str = "train"
    metrics: Mapping[str, float]
    learning_rate: float | None = None
    sparsity: float | None = None
    penalty: float | None = None
    weight_sparsity: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    weight_penalty: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    examples_per_second: float | None = None
    seconds: float
    seconds_left: float | None = None
