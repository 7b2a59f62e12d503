"""Compares masks with their schedules when training begins.

A new optimizer counts its steps from 0, where the schedule would make a pruned
model dense. Weights of an earlier step bring back masks with fewer zeros.
"""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np

from sos.advice import warn
from sos.arguments import format_values
from sos.masks import keep_count
from sos.rankings import PerTensorRanking, Ranking
from sos.schedules import Schedule
from sos.wrappers.masked import PruningWrapper

# Rankings other than `PerTensorRanking` may miss the sparsity by this fraction.
_TOLERANCE = 0.01


class HeldMasks:
    """Holds masks that an update would make dense.

    Masks at the start of training may differ from their schedules:

    - They have more zeros than the schedule at the optimizer's step, but not
      more than at its end. The optimizer is new and counts from 0. They are
      held until the schedule reaches their sparsity.
    - They have more zeros than the schedule at its end. A lower sparsity was
      requested, and they follow the schedule.
    - They have fewer zeros than the schedule, and no update follows.

    Each case warns with a `SparsityWarning`.

    Args:
        wrappers: The techniques.
        step: The optimizer's step at the start of training.
    """

    def __init__(self, wrappers: Sequence[PruningWrapper], step: int) -> None:
        self._groups: list[_Group] = []
        denser, lower, fewer = [], [], []
        for group in _groups(wrappers):
            zeros = group.zeros()
            if not zeros:
                continue
            # A checkpoint may be written before the update of its step.
            scheduled = [
                group.expected(lambda s, t=t: _last_sparsity(s, t))
                for t in (step - 1, step)
            ]
            margin = group.margin()
            if zeros > max(scheduled) + margin and not group.cumulative:
                end = group.expected(lambda s: s.target_sparsity)
                if end is None or zeros <= end + margin:
                    group.hold(zeros)
                    self._groups.append(group)
                    denser.append((group, zeros, max(scheduled)))
                elif group.has_updates(step):
                    lower.append((group, zeros, end))
            # A tensor may keep its last weight.
            elif zeros < min(scheduled) - margin - group.tensors():
                if not group.has_updates(step):
                    fewer.append((group, zeros, scheduled[1]))
        if denser:
            warn(
                f"{_describe(denser)} more than the schedule at step {step} of "
                f"the optimizer ({_percent(denser, 2)}). A new optimizer "
                "counts its steps anew, from 0. The masks stay as they are "
                "until the schedule reaches their sparsity. To continue the "
                "schedule, set `model.optimizer.iterations.assign(step)` "
                "before training, or load the optimizer's state with the "
                "model. To fine-tune with masks that never change, train "
                '`sos.sparsify(sos.strip(model), "FixedMask")`.'
            )
        if lower:
            warn(
                f"{_describe(lower)} more than the schedule ends with "
                f"({_percent(lower, 2)}), and will follow the schedule: "
                "pruned weights come back. To keep the masks, set a schedule "
                "with their sparsity."
            )
        if fewer:
            warn(
                f"{_describe(fewer)} less than the schedule at its last update "
                f"({_percent(fewer, 2)}), and no update follows: the model "
                "stays less sparse than its target. If the weights are of an "
                "earlier step, set `model.optimizer.iterations.assign(step)` "
                "to that step. Otherwise set a `schedule` that ends later "
                "(`sos.set_hyperparameters(model, schedule=...)`)."
            )

    def holds(self, wrapper: PruningWrapper, step: int) -> bool:
        """Returns whether an update must leave the masks of a technique alone.

        Args:
            wrapper: The technique.
            step: The step of the update.
        """
        for group in self._groups:
            if wrapper not in group.wrappers:
                continue
            zeros = group.expected(lambda s: s.sparsity(step))
            if (
                group.has_new_schedule()
                or zeros >= group.zeros_held - group.margin()
            ):
                self._groups.remove(group)
                return False
            return True
        return False


def mask_zeros(wrappers: Sequence[PruningWrapper]) -> tuple[int, int]:
    """Returns the number of zeros in the masks of techniques, and their size.

    Args:
        wrappers: The techniques.
    """
    zeros = size = 0
    for wrapper in wrappers:
        for weight in wrapper.sparse_weights:
            mask = keras.ops.convert_to_numpy(weight.state["mask"])
            zeros += mask.size - int(np.count_nonzero(mask))
            size += mask.size
    return zeros, size


@dataclasses.dataclass(eq=False)
class _Group:
    """Techniques whose weights are ranked together, to one sparsity."""

    ranking: Ranking
    wrappers: list[PruningWrapper]
    zeros_held: int = 0
    schedules: list[Schedule] = dataclasses.field(default_factory=list)

    @property
    def cumulative(self) -> bool:
        """Whether pruned weights stay pruned, whatever the schedule."""
        return all(w.cumulative for w in self.wrappers)

    def hold(self, zeros: int) -> None:
        """Records the number of zeros and the schedules."""
        self.zeros_held = zeros
        self.schedules = [w.schedule for w in self.wrappers]

    def zeros(self) -> int:
        return mask_zeros(self.wrappers)[0]

    def margin(self) -> float:
        """Returns the number of zeros that the ranking may miss."""
        if isinstance(self.ranking, PerTensorRanking):
            return 0
        return self.tensors() + _TOLERANCE * self.size()

    def tensors(self) -> int:
        """Returns the number of weights."""
        return sum(map(len, self._sizes()))

    def size(self) -> int:
        """Returns the number of elements of the weights."""
        return sum(map(sum, self._sizes()))

    def expected(
        self, sparsity: Callable[[Schedule], float | None]
    ) -> int | None:
        """Returns the zeros of the given sparsities, None if one is unknown.

        Args:
            sparsity: Maps a technique's schedule to a sparsity in [0, 1].
        """
        sparsities = [sparsity(w.schedule) for w in self.wrappers]
        if None in sparsities:
            return None
        return sum(
            size - keep_count(size, value)
            for value, sizes in zip(sparsities, self._sizes(), strict=True)
            for size in sizes
        )

    def has_updates(self, step: int) -> bool:
        """Returns whether masks are updated at this step or later."""
        return any(
            w.schedule.end_step is None or w.schedule.end_step >= step
            for w in self.wrappers
        )

    def has_new_schedule(self) -> bool:
        """Returns whether a schedule was replaced since `hold`."""
        return any(
            w.schedule is not schedule
            for w, schedule in zip(self.wrappers, self.schedules, strict=True)
        )

    def _sizes(self) -> list[list[int]]:
        return [
            [int(np.prod(weight.variable.shape)) for weight in w.sparse_weights]
            for w in self.wrappers
        ]


def _groups(wrappers: Sequence[PruningWrapper]) -> list[_Group]:
    groups: list[_Group] = []
    for wrapper in wrappers:
        for group in groups:
            if group.ranking == wrapper.ranking and not isinstance(
                group.ranking, PerTensorRanking
            ):
                group.wrappers.append(wrapper)
                break
        else:
            groups.append(_Group(wrapper.ranking, [wrapper]))
    return groups


def _last_sparsity(schedule: Schedule, step: int) -> float:
    """Returns the sparsity of the last update up to a step, 0 without one."""
    # Search backwards in growing windows: a user's schedule is called once per
    # step.
    last, window = step, 1
    while last >= 0:
        due = schedule.due_steps(max(last - window, -1), last)
        if due:
            return schedule.sparsity(due[-1])
        last, window = last - window, 2 * window
    return 0.0


def _describe(entries: list[tuple[_Group, int, int]]) -> str:
    names = [w.name for group, _, _ in entries for w in group.wrappers]
    text = format_values(names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return f"The masks of {text} have {_percent(entries, 1)} zeros,"


def _percent(entries: list[tuple[_Group, int, int]], index: int) -> str:
    size = sum(group.size() for group, _, _ in entries)
    return f"{sum(entry[index] for entry in entries) / size:.2%}"
