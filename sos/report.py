"""Reports the sparsity of a model's weights, and why some are dense."""

import csv
import os
import shutil
import sys
from typing import Any

import keras
import numpy as np
import rich.box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from sos import keras_compat, uses
from sos.errors import UsageError
from sos.files import atomic_write
from sos.multiply_adds import uses_by_variable
from sos.wrappers.base import (
    check_keras_layer,
    find_wrappers,
    weights_by_path,
)
from sos.wrappers.selection import dense_reasons, path_in
from sos.wrappers.sparse_layer import owners, plain_class

#: The keys of a row, in order.
FIELDS = (
    "layer",
    "weight",
    "technique",
    "rank",
    "size",
    "nonzeros",
    "sparsity",
    "target",
    "reason",
    "multiply_adds",
    "sparse_multiply_adds",
)


class SparsityReport:
    """Rows for all weights of a model, and totals.

    It prints as a table, coloured in Jupyter and by `rich.print`.

    Attributes:
        rows: Dictionaries with the keys `FIELDS`, one per weight. `technique`
            is empty for a dense weight, and `reason` says why it is dense.
            `target` is the sparsity that the technique aims at, None if it has
            none. `multiply_adds` and `sparse_multiply_adds` are those of one
            example, with all elements and with the nonzeros only; None if
            unknown.
        name: Name of the model.
    """

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name = name
        self.rows = rows

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weights with a technique."""
        return _sparsity([row for row in self.rows if row["technique"]])

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros in all weights of the model."""
        return _sparsity(self.rows)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all rows, with the keys of a row."""
        known = [row for row in self.rows if row["multiply_adds"] is not None]
        return {
            "layer": "total",
            "weight": "",
            "technique": "",
            "rank": None,
            "size": sum(row["size"] for row in self.rows),
            "nonzeros": sum(row["nonzeros"] for row in self.rows),
            "sparsity": self.model_sparsity,
            "target": None,
            "reason": "",
            "multiply_adds": sum(row["multiply_adds"] for row in known),
            "sparse_multiply_adds": sum(
                row["sparse_multiply_adds"] for row in known
            ),
        }

    def save_csv(self, path: str | os.PathLike) -> None:
        """Writes the rows, without the totals, to a CSV file.

        Args:
            path: Path of the file. On an error it stays as it was.
        """
        with (
            atomic_write(path) as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yields the table, with multiply-adds if it is wide enough."""
        yield self._table(wide=options.max_width >= 100)

    def _table(self, wide: bool) -> Table:
        """Returns a table with a summary line for biases and other vectors."""
        has_techniques = any(row["technique"] for row in self.rows)
        caption = f"{self.model_sparsity:.2%} of all weights are zero"
        if has_techniques:
            caption = (
                f"{self.sparsity:.2%} of the weights made sparse are zero, "
                f"{caption.removesuffix(' are zero')}"
            )
        table = Table(
            title=f"Sparsity of {self.name}",
            box=rich.box.SIMPLE_HEAD,
            caption=caption,
            caption_justify="left",
        )
        table.add_column("weight", overflow="fold")
        headings = ["size", "zero", "target"]
        with_costs = wide and any(
            row["multiply_adds"] is not None for row in self.rows
        )
        if with_costs:
            headings += ["multiply-adds", "sparse"]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("technique, or why none")
        vectors = [row for row in self.rows if _is_vector(row)]
        for row in self.rows:
            if not _is_vector(row):
                table.add_row(row["weight"], *_cells(row, with_costs))
        if vectors:
            summary = {
                **dict.fromkeys(FIELDS, ""),
                "size": sum(row["size"] for row in vectors),
                "nonzeros": sum(row["nonzeros"] for row in vectors),
                "sparsity": _sparsity(vectors),
                "target": None,
                "reason": "biases, norms",
                "multiply_adds": None,
                "sparse_multiply_adds": None,
            }
            plural = "s" * (len(vectors) > 1)
            table.add_row(
                f"{len(vectors)} vector{plural}", *_cells(summary, with_costs)
            )
        table.add_section()
        table.add_row("total", *_cells(self.totals, with_costs), style="bold")
        unknown = [
            row
            for row in self.rows
            if row["multiply_adds"] is None and not _is_vector(row)
        ]
        if with_costs and unknown:
            table.caption += (
                f"; multiply-adds of {len(unknown)} weights are not known and "
                "not in the total"
            )
        return table

    def __str__(self) -> str:
        """Returns the table as plain text, as wide as a terminal if any."""
        return as_text(self)


def as_text(table: Any) -> str:
    """Returns a table as plain text, as wide as a terminal if any.

    Args:
        table: What Rich can print.
    """
    width = 1000
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    # Labels and paths may have brackets.
    console = Console(
        width=width,
        no_color=True,
        force_terminal=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def sparsity_report(
    model: keras.layers.Layer, inputs: Any = None
) -> SparsityReport:
    """Reports the sparsity of every weight of a model.

    Zeros are with_costs in the evaluation weights. Variational dropout removes
    weights whose log alpha reaches the threshold; L0 regularisation multiplies
    weights by the deterministic gate.

    Args:
        model: A Keras 3 model or layer, sparse or plain, built.
        inputs: Arrays or symbolic tensors to count multiply-adds for, in the
            structure that the model takes. By default one example of the
            model's input shapes; a language model, whose length is unknown,
            needs them.

    Returns:
        The report.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.
        UsageError: If it is not built.

    Example:
    >>> import keras, sos
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> kernel, bias = sos.sparsity_report(model).rows
    >>> kernel["size"], kernel["sparsity"], kernel["multiply_adds"]
    (8, 0.0, 8)
    >>> bias["reason"]
    'rank 1'
    """
    check_keras_layer(model, "sparsity_report")
    if not model.built:
        raise UsageError(
            f"The model {model.name!r} has no weights to report, as it is not "
            "built. Give it an `Input` or call it on a batch first."
        )
    return _report(model, uses_by_variable(model, inputs))


def report_without_costs(model: keras.layers.Layer) -> SparsityReport:
    """Reports sparsity without multiply-adds.

    Counting these traces the model, which takes seconds for a large one.

    Args:
        model: A Keras 3 model or layer, built.
    """
    return _report(model, {})


def _report(
    model: keras.layers.Layer, number_of_uses: dict[int, int]
) -> SparsityReport:
    sparse = {}
    state = set()
    paths = {
        id(weight.variable): path
        for path, weight in weights_by_path(model).items()
    }
    for wrapper in find_wrappers(model):
        state |= {id(v) for v in keras_compat.own_variables(wrapper)}
        for weight, value in wrapper.evaluation_weights().items():
            sparse[id(weight.variable)] = (wrapper, value)
    whole = _sampled_as_a_whole(model)
    recorded = getattr(model, "sparsity_reasons", None)
    trainable = {id(v) for v in model.trainable_weights}
    reasons = dense_reasons(model)
    rows = []
    for variable in model.weights:
        if id(variable) in state:
            continue
        wrapper, value = sparse.get(id(variable), (None, variable))
        reason = None if recorded is None else recorded.get(variable)
        if wrapper is not None:
            samples = wrapper.samples_outputs and id(variable) in whole
            reason = "sampled as a whole" if samples else None
        elif reason is None:
            unwrapped = (
                "in no sparse layer"
                if id(variable) in trainable
                else "not trainable"
            )
            reason = reasons.get(id(variable), unwrapped)
        path = paths.get(id(variable), path_in(model, variable))
        size = int(np.prod(variable.shape))
        nonzeros = int(np.count_nonzero(keras.ops.convert_to_numpy(value)))
        if wrapper is not None and size and not nonzeros:
            reason = ", ".join(filter(None, [reason, "no weight is left"]))
        times = number_of_uses.get(id(variable))
        rows.append(
            {
                "layer": path.rpartition("/")[0],
                "weight": path,
                "technique": type(wrapper).__name__ if wrapper else "",
                "rank": len(variable.shape),
                "size": size,
                "nonzeros": nonzeros,
                "sparsity": 1 - nonzeros / size if size else 0.0,
                "target": wrapper.target_sparsity() if wrapper else None,
                "reason": reason or "",
                "multiply_adds": None if times is None else times * size,
                "sparse_multiply_adds": (
                    None if times is None else times * nonzeros
                ),
            }
        )
    return SparsityReport(model.name, rows)


def _sampled_as_a_whole(model: keras.layers.Layer) -> set[int]:
    """Returns weights, by `id`, whose layers have no registered use."""
    return {
        id(variable)
        for owner, variable in owners(model)
        if not _samples_outputs(owner)
    }


def _samples_outputs(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.TimeDistributed):
        return _samples_outputs(layer.layer)
    # Their registered uses are for multiply-adds only.
    exceptions = (
        keras.layers.RNN
        | keras.layers.SeparableConv1D
        | keras.layers.SeparableConv2D
    )
    return not isinstance(layer, exceptions) and (
        uses.describer(plain_class(layer)) is not None
    )


def _is_vector(row: dict[str, Any]) -> bool:
    return not row["technique"] and (row["rank"] < 2 or row["reason"] == "bias")


def _sparsity(rows: list[dict[str, Any]]) -> float:
    size = sum(row["size"] for row in rows)
    return 1 - sum(row["nonzeros"] for row in rows) / size if size else 0.0


def _cells(row: dict[str, Any], with_costs: bool) -> list[str]:
    target, macs = row["target"], row["multiply_adds"]
    remarks = [text for text in (row["technique"], row["reason"]) if text]
    return [
        f"{row['size']:,}",
        f"{row['sparsity']:.2%}",
        "" if target is None else f"{target:.2%}",
        *([_short(macs), _short(row["sparse_multiply_adds"])] * with_costs),
        ", ".join(remarks),
    ]


def _short(number: int | None) -> str:
    """Formats a number by three digits and a unit, such as 3.86 G."""
    if number is None:
        return ""
    for unit in ("", " k", " M", " G", " T"):
        if number < 999.5 or unit == " T":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
