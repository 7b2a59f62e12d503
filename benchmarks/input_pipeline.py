"""Times the training input of ImageNet against bare decoding.

    python -m benchmarks.input_pipeline [--images=2048] [--repeats=5]
        [--warm_up=4] [--json]

Contestants run in turns on the same JPEGs, photographs of 500x400 pixels and
quality 95 with about 100 kB. Medians are compared with the bound:

- bare kernels: TensorFlow's kernels to decode a crop, resize it to 224x224 and
  flip it, called from as many Python threads as there are cores. The JPEGs are
  in memory, and the crops are known;
- PIL: the same with PIL, which decodes the whole image and averages;
- `TfdsImages.train` and `TfdsImages.eval`: the batches of training and
  evaluation, from records on the disk to batches of 128. They are timed after
  `--warm_up` seconds, as tf.data adds threads during the first ones; 0 times
  them from their start.

The milliseconds of processor time for an image count all threads. From them
follows how many such cores feed an H100, whose training step of ResNet-50 takes
5,600 images a second. It takes about three minutes and 450 MB of disk on two
cores. With `--images=256 --repeats=1 --warm_up=0` it takes seconds.
"""

import argparse
import importlib.resources
import io
import itertools
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from PIL import Image

from benchmarks.common import print_report
from sos.datasets import imagenet, write_images

# Height and width, about the mean of ImageNet.
IMAGE_SIZE = (400, 500)
SIZE = 224
BATCH = 128
NAME = "photographs"
# Images that an H100 takes in a second; see `benchmarks.gpu_step`.
H100_RATE = 5600

PHOTOGRAPHS = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets", "images/china.jpg"),
    ("sklearn.datasets", "images/flower.jpg"),
)

BOUND = "bare kernels"


def make_jpegs(count: int) -> list[bytes]:
    """Returns JPEGs of random parts of photographs."""
    generator = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    photographs = []
    for package, path in PHOTOGRAPHS:
        file = importlib.resources.files(package).joinpath(path)
        image = Image.open(io.BytesIO(file.read_bytes()))
        photographs.append(image.convert("RGB"))
    jpegs = []
    for photograph in itertools.islice(itertools.cycle(photographs), count):
        # Between all of it and 80 % of its sides.
        scale = generator.uniform(0.8, 1.0)
        sides = [scale * side for side in photograph.size]
        left, top = (
            generator.uniform(0, whole - side)
            for whole, side in zip(photograph.size, sides, strict=True)
        )
        part = photograph.resize(
            (width, height),
            Image.BICUBIC,
            box=(left, top, left + sides[0], top + sides[1]),
        )
        output = io.BytesIO()
        # With all colours, the files are about as large as those of ImageNet.
        part.save(output, "JPEG", quality=95, subsampling=0)
        jpegs.append(output.getvalue())
    return jpegs


def make_boxes(count: int) -> np.ndarray:
    """Returns crops as in training: top, left, height, width and flip."""
    boxes = []
    for index in range(count):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            (*IMAGE_SIZE, 3),
            tf.zeros((1, 0, 4)),
            (0, index),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        boxes.append([*begin.numpy()[:2], *size.numpy()[:2], index % 2])
    return np.array(boxes, np.int32)


def in_threads(call: Callable[[int], object], count: int) -> None:
    """Calls a function with every index, from as many threads as cores."""
    indices = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                index = next(indices, None)
            if index is None:
                return
            call(index)

    threads = [threading.Thread(target=work) for _ in range(_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def make_contestants(
    jpegs: list[bytes], directory: pathlib.Path, warm_up: float
) -> dict[str, Callable[[], Iterator[None]]]:
    """Returns generators that process as many images between two `yield`s."""
    boxes = make_boxes(len(jpegs))
    contents = [tf.constant(jpeg) for jpeg in jpegs]
    crops = [tf.constant(box[:4]) for box in boxes]
    flips = [tf.constant([False, bool(flip), False]) for flip in boxes[:, 4]]
    size = tf.constant([SIZE, SIZE])
    axis = tf.constant(0)
    source = imagenet.TfdsImages(
        NAME,
        directory=directory,
        seed=0,
        batch_size=BATCH,
        eval_batch_size=BATCH,
        shuffle_buffer=256,
    )
    context = tf.distribute.InputContext()

    def kernels(index: int) -> None:
        ops = tf.raw_ops
        crop = ops.DecodeAndCropJpeg(
            contents=contents[index], crop_window=crops[index], channels=3
        )
        image = ops.ResizeBicubic(
            images=ops.ExpandDims(input=crop, axis=axis),
            size=size,
            half_pixel_centers=True,
        )
        pixels = ops.Cast(x=image, DstT=tf.uint8)
        pixels = ops.Squeeze(input=pixels, axis=[0])
        ops.Reverse(tensor=pixels, dims=flips[index])

    def pil(index: int) -> None:
        top, left, height, width, flip = map(int, boxes[index])
        image = Image.open(io.BytesIO(jpegs[index])).resize(
            (SIZE, SIZE),
            Image.BICUBIC,
            box=(left, top, left + width, top + height),
        )
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.asarray(image)

    def bare(call: Callable[[int], None]) -> Iterator[None]:
        call(0)
        yield
        in_threads(call, len(jpegs))
        yield

    def batches(dataset: tf.data.Dataset) -> Iterator[None]:
        iterator = iter(dataset)
        start = time.perf_counter()
        # Without a warm-up, the first batch is timed: a few more may be ready
        # as soon as it is there, and take no time.
        while time.perf_counter() - start < warm_up:
            next(iterator)
        yield
        for _ in range(len(jpegs) // BATCH):
            next(iterator)
        yield

    return {
        BOUND: lambda: bare(kernels),
        "PIL": lambda: bare(pil),
        "TfdsImages.train": lambda: batches(source.train(context, 0)),
        "TfdsImages.eval": lambda: batches(source.eval(context).repeat()),
    }


def measure(
    contestants: dict[str, Callable[[], Iterator[None]]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Runs the contestants in turns.

    Returns:
        For each, seconds and seconds of processor time of every turn.
    """
    measured = {name: [] for name in contestants}
    # The first turn warms up caches and is not counted.
    for turn in range(-1, repeats):
        for name, make in contestants.items():
            run = make()
            next(run)
            start = time.perf_counter(), time.process_time()
            next(run)
            end = time.perf_counter(), time.process_time()
            # Stops the threads of the input.
            run.close()
            if turn >= 0:
                measured[name].append((end[0] - start[0], end[1] - start[1]))
    return measured


def main() -> None:
    """Measures and prints a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--images", type=int, default=2048, help="number of images in a turn"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument(
        "--warm_up",
        type=float,
        default=4.0,
        help="seconds before an input is timed; 0 times its start too",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    flags = parser.parse_args()
    for name, least in (("repeats", 1), ("images", 2 * BATCH)):
        if getattr(flags, name) < least:
            parser.error(
                f"--{name} must be at least {least}. "
                f"Received: {getattr(flags, name)}"
            )
    images = flags.images // BATCH * BATCH
    jpegs = make_jpegs(images)
    with tempfile.TemporaryDirectory() as folder:
        labelled = [(jpeg, index % 10) for index, jpeg in enumerate(jpegs)]
        write_images(
            folder,
            {"train": labelled, "validation": labelled},
            name=NAME,
            class_names=[str(label) for label in range(10)],
            shards=16,
        )
        contestants = make_contestants(
            jpegs, pathlib.Path(folder), flags.warm_up
        )
        measured = measure(contestants, flags.repeats)
    results = {}
    for name, turns in measured.items():
        rate, processor = (
            statistics.median(values) / images
            for values in zip(*turns, strict=True)
        )
        bounds = [
            (seconds / own, processor_seconds / own_processor)
            for (seconds, processor_seconds), (own, own_processor) in zip(
                measured[BOUND], turns, strict=True
            )
        ]
        of_bound, of_bound_processor = (
            statistics.median(values) for values in zip(*bounds, strict=True)
        )
        results[name] = {
            "images_per_second": round(1 / rate),
            "of_bound": round(of_bound, 3),
            "processor_ms": round(1e3 * processor, 3),
            "processor_of_bound": round(of_bound_processor, 3),
            "cores_for_h100": round(H100_RATE * processor, 1),
        }
    size = sum(map(len, jpegs)) / images
    print_report(
        f"Input of ImageNet: {images:,} JPEGs of {size / 1e3:.0f} kB in a turn",
        {
            "benchmark": "input_pipeline",
            "images": images,
            "image_bytes": round(size),
            "batch_size": BATCH,
            "threads": _cores(),
            "repeats": flags.repeats,
            "results": results,
        },
        flags.json,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
