"""Input pipelines that are functions of the seed, the epoch and the step.

To resume, they need only the number of completed steps: the following batches
do not depend on where training began. `array_batches` and `array_eval_batches`
read arrays in memory. `record_batches` and `record_eval_batches` read files of
records; each host reads its own files.
"""

from sos.training.inputs.arrays import array_batches, array_eval_batches
from sos.training.inputs.batches import whole_batch
from sos.training.inputs.errors import input_errors, usage_error
from sos.training.inputs.records import record_batches, record_eval_batches
from sos.training.inputs.shards import Read, Shard, list_shards

__all__ = [
    "Read",
    "Shard",
    "array_batches",
    "array_eval_batches",
    "input_errors",
    "list_shards",
    "record_batches",
    "record_eval_batches",
    "usage_error",
    "whole_batch",
]
