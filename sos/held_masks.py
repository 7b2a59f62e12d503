"""Masks that do not fit their schedules at the optimizer's step.

A new optimizer counts from 0 again, and the schedule would make a pruned model
dense. Weights of an earlier moment bring back masks with fewer zeros.
"""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np

from sos.advice import warn
from sos.arguments import listed
from sos.masks import keep_count
from sos.rankings import PerTensorRanking, Ranking
from sos.schedules import Schedule
from sos.wrappers.masked import PruningWrapper

# A ranking other than the exact one may miss the sparsity by this fraction.
_TOLERANCE = 0.01


class HeldMasks:
    """Keeps masks that an update would make dense.

    Masks are held if they have more zeros than their schedule gives for the
    optimizer's step, and not more than it ends with: the optimizer's counter
    began anew. They are held until the schedule reaches their sparsity. Masks
    with more zeros than the schedule ends with follow it, as somebody asked for
    a lower sparsity. In both cases a warning says so, and also if masks have
    fewer zeros than the schedule gives and no update is to come.

    Args:
        wrappers: The layers.
        step: The optimizer's step at the start of training.
    """

    def __init__(self, wrappers: Sequence[PruningWrapper], step: int) -> None:
        self._groups: list[_Group] = []
        denser, lower, fewer = [], [], []
        for group in _groups(wrappers):
            zeros = group.zeros()
            if not zeros:
                continue
            # A checkpoint may be of the moment before the update of its step.
            due = [
                group.expected(lambda s, t=t: _last_sparsity(s, t))
                for t in (step - 1, step)
            ]
            margin = group.margin()
            if zeros > max(due) + margin and not group.cumulative:
                end = group.expected(lambda s: s.target_sparsity)
                if end is None or zeros <= end + margin:
                    group.hold(zeros)
                    self._groups.append(group)
                    denser.append((group, zeros, max(due)))
                elif group.has_updates(step):
                    lower.append((group, zeros, end))
            # A tensor may keep its last weight.
            elif zeros < min(due) - margin - group.tensors():
                if not group.has_updates(step):
                    fewer.append((group, zeros, due[1]))
        if denser:
            warn(
                f"{_describe(denser)} more than the schedule has at step "
                f"{step} of the optimizer ({_percent(denser, 2)}). Its counter "
                "began anew, as that of every new optimizer does. The masks "
                "are kept as they are until the schedule reaches their "
                "sparsity. To continue the schedule, set "
                "`model.optimizer.iterations.assign(step)` before training, or "
                "load the optimizer's state with the model. To fine-tune with "
                "masks that never change, train "
                '`sos.sparsify(sos.strip(model), "FixedMask")`.'
            )
        if lower:
            warn(
                f"{_describe(lower)} more than the schedule ends with "
                f"({_percent(lower, 2)}), and will follow the schedule: "
                "pruned weights come back. To keep the masks, give the layers "
                "a schedule with their sparsity."
            )
        if fewer:
            warn(
                f"{_describe(fewer)} less than the schedule had at its last "
                f"update ({_percent(fewer, 2)}), and no update is to come: the "
                "model stays less sparse than its target. Were weights of an "
                "earlier moment loaded? Set a `schedule` that goes on "
                "(`sos.set_hyperparameters(model, schedule=...)`), or set "
                "`model.optimizer.iterations.assign(step)` to the step of the "
                "weights."
            )

    def holds(self, wrapper: PruningWrapper, step: int) -> bool:
        """Returns whether the masks of a layer are not to be updated.

        Args:
            wrapper: The layer.
            step: The step of the update.
        """
        for group in self._groups:
            if wrapper not in group.wrappers:
                continue
            now = group.expected(lambda s: s.sparsity(step))
            if group.changed() or now >= group.held - group.margin():
                self._groups.remove(group)
                return False
            return True
        return False


def mask_zeros(wrappers: Sequence[PruningWrapper]) -> tuple[int, int]:
    """Returns the number of zeros in the masks of layers, and their size."""
    zeros = size = 0
    for wrapper in wrappers:
        for weight in wrapper.sparse_weights:
            mask = keras.ops.convert_to_numpy(weight.state["mask"])
            zeros += mask.size - int(np.count_nonzero(mask))
            size += mask.size
    return zeros, size


@dataclasses.dataclass(eq=False)
class _Group:
    """Layers whose weights share one sparsity, as they are ranked together."""

    ranking: Ranking
    wrappers: list[PruningWrapper]
    held: int = 0
    schedules: list[Schedule] = dataclasses.field(default_factory=list)

    @property
    def cumulative(self) -> bool:
        """Whether no weight comes back, whatever the schedule says."""
        return all(w.cumulative for w in self.wrappers)

    def hold(self, zeros: int) -> None:
        """Records how many zeros are held, under which schedules."""
        self.held = zeros
        self.schedules = [w.schedule for w in self.wrappers]

    def zeros(self) -> int:
        return mask_zeros(self.wrappers)[0]

    def margin(self) -> float:
        """How many zeros the ranking may miss."""
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
        """Returns the zeros that schedules ask for; None if one is unknown."""
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

    def changed(self) -> bool:
        """Returns whether somebody replaced a schedule since."""
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
    # Backwards in growing windows: a user's schedule is asked step by step.
    last, window = step, 1
    while last >= 0:
        due = schedule.due_steps(max(last - window, -1), last)
        if due:
            return schedule.sparsity(due[-1])
        last, window = last - window, 2 * window
    return 0.0


def _describe(found: list[tuple[_Group, int, int]]) -> str:
    names = [w.name for group, _, _ in found for w in group.wrappers]
    shown = listed(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return f"The masks of {shown} have {_percent(found, 1)} zeros,"


def _percent(found: list[tuple[_Group, int, int]], index: int) -> str:
    size = sum(group.size() for group, _, _ in found)
    return f"{sum(entry[index] for entry in found) / size:.2%}"
