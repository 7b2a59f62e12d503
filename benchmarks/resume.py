"""Times what resuming costs: saving, restoring, and skipping records.

    python -m benchmarks.resume [--model=resnet50] [--repeats=5]
        [--files=64] [--records=12800] [--json]

Contestants run in turns, and medians are compared with the minimal work:

- saving a model with magnitude pruning and the two slots of Adam: by the engine
  (atomically, flushed to the disk); by `tf.train.Checkpoint.write`; and by the
  latter followed by `fsync`, without which a power failure may lose the file;
- restoring it: by the engine, and by `tf.train.Checkpoint.read`. All files are
  in the page cache;
- the first batch of JPEG records by `sos.training.record_batches`: at the
  beginning of an epoch, and where 90 % of it was used before. Either reads a
  block of records to shuffle. The third only reads 90 % of the records, which
  skipping without whole files takes at least.

It takes about two minutes, 3 GB of memory and 4 GB of disk on two cores. With
`--model=small --files=4 --records=100 --repeats=1` it takes seconds.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import keras
import tensorflow as tf

import sos
from benchmarks.common import print_report
from sos.training.checkpoints import Checkpoints
from sos.training.inputs import Shard, record_batches

BATCH = 50
SHUFFLE_BUFFER = 1000
# Of the epoch that is resumed.
USED = 0.9
# Height and width of a typical image of ImageNet.
IMAGE_SIZE = (375, 500)

MODELS = {
    "resnet50": lambda: keras.applications.ResNet50(weights=None),
    "small": lambda: keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8)], name="small"
    ),
}

# The others of each group are compared with the first.
GROUPS = (
    (
        "save: tf.train.Checkpoint",
        "save: tf.train.Checkpoint, fsync",
        "save: sos",
    ),
    ("restore: tf.train.Checkpoint", "restore: sos"),
    (
        "records: first batch at 0 %",
        "records: first batch at 90 %",
        "records: read 90 %",
    ),
)


def checkpoint_contestants(
    folder: pathlib.Path, model: keras.Model
) -> tuple[dict[str, Callable[[], None]], int]:
    """Returns functions that save or restore, and the number of values."""
    model = sos.sparsify(
        model,
        sos.MagnitudePruning,
        schedule=sos.schedules.ConstantSparsity(0.9, 0),
        copy=False,
    )
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(folder / "sos", configuration={}, keep=2)
    bare = str(folder / "bare" / "variables")
    steps = itertools.count(1)

    def write() -> None:
        tf.train.Checkpoint(model=model, optimizer=optimizer).write(bare)

    def write_to_disk() -> None:
        write()
        for path in (folder / "bare").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def save() -> None:
        step = next(steps)
        optimizer.iterations.assign(step)
        checkpoints.save(step, model, optimizer)

    def read() -> None:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
        checkpoint.read(bare).assert_existing_objects_matched()

    def restore() -> None:
        assert checkpoints.restore(model, optimizer)

    save_names, restore_names = GROUPS[:2]
    contestants = (write, write_to_disk, save, read, restore)
    values = sum(v.value.shape.num_elements() for v in model.variables)
    values += sum(v.value.shape.num_elements() for v in optimizer.variables)
    return (
        dict(zip(save_names + restore_names, contestants, strict=True)),
        values,
    )


def write_records(
    folder: pathlib.Path, files: int, count: int
) -> tuple[list[Shard], float]:
    """Writes JPEG records; returns their shards and mean size in bytes."""
    height, width = IMAGE_SIZE
    # The noise makes files of about 110 kB, as in ImageNet.
    coarse = tf.random.stateless_uniform((1, 25, 33, 3), (0, 1), 0.0, 255.0)
    smooth = tf.image.resize(coarse, (height, width), "bicubic")[0]
    images = []
    for index in range(20):
        noise = tf.random.stateless_normal(
            (height, width, 3), (index, 2), stddev=30.0
        )
        pixels = tf.clip_by_value(smooth + noise, 0.0, 255.0)
        images.append(
            tf.io.encode_jpeg(tf.cast(pixels, tf.uint8), quality=85).numpy()
        )
    shards = []
    for number in range(files):
        shard = Shard(
            str(folder / f"records-{number}"), len(range(number, count, files))
        )
        with tf.io.TFRecordWriter(shard.path) as writer:
            for index in range(shard.examples):
                writer.write(images[index % len(images)])
        shards.append(shard)
    return shards, sum(map(len, images)) / len(images)


def record_contestants(
    shards: list[Shard],
) -> dict[str, Callable[[], None]]:
    """Returns functions that resume, or only read what was used before."""

    def decode(record: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(record, channels=3)
        image = tf.image.resize(image, (224, 224))
        return tf.ensure_shape(image, (224, 224, 3))

    def first_batch(step: int) -> None:
        batches = record_batches(
            shards,
            decode,
            seed=0,
            batch_size=BATCH,
            step=step,
            context=tf.distribute.InputContext(),
            shuffle_buffer=SHUFFLE_BUFFER,
        )
        next(iter(batches))

    def read() -> None:
        records = tf.data.TFRecordDataset([shard.path for shard in shards])
        for _ in records.take(used * BATCH).batch(BATCH):
            pass

    used = int(USED * (sum(shard.examples for shard in shards) // BATCH))
    return dict(
        zip(
            GROUPS[2],
            (lambda: first_batch(0), lambda: first_batch(used), read),
            strict=True,
        )
    )


def measure(
    contestants: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[float]]:
    """Runs the contestants in turns and returns the seconds of each."""
    seconds = {name: [] for name in contestants}
    # The first turn warms up caches and is not counted.
    for turn in range(-1, repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", choices=MODELS, default="resnet50", help="model to save"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument(
        "--files", type=int, default=64, help="number of files of records"
    )
    parser.add_argument(
        "--records", type=int, default=12_800, help="number of JPEG records"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    flags = parser.parse_args()
    for name, least in (("repeats", 1), ("files", 1), ("records", 2 * BATCH)):
        if getattr(flags, name) < least:
            parser.error(
                f"--{name} must be at least {least}. "
                f"Received: {getattr(flags, name)}"
            )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "bare").mkdir()
        contestants, values = checkpoint_contestants(
            folder, MODELS[flags.model]()
        )
        seconds = measure(contestants, flags.repeats)
        shards, record_size = write_records(folder, flags.files, flags.records)
        seconds |= measure(record_contestants(shards), flags.repeats)
    results = {}
    for group in GROUPS:
        least = statistics.median(seconds[group[0]])
        for contestant in group:
            median = statistics.median(seconds[contestant])
            results[contestant] = {
                "median_ms": round(1e3 * median, 1),
                "min_ms": round(1e3 * min(seconds[contestant]), 1),
                "max_ms": round(1e3 * max(seconds[contestant]), 1),
                "times_first": round(median / least, 2),
            }
    print_report(
        f"Resuming: checkpoints of {values:,} values, and {flags.files} files "
        f"of {flags.records:,} records of {record_size / 1e3:.0f} kB",
        {
            "benchmark": "resume",
            "model": flags.model,
            "values": values,
            "files": flags.files,
            "records": flags.records,
            "record_bytes": round(record_size),
            "repeats": flags.repeats,
            "results": results,
        },
        flags.json,
    )


if __name__ == "__main__":
    main()
