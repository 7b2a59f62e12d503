"""Reads the text of programs that XLA optimised."""

import re

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
# Instructions whose results share the memory of their operands.
_VIEWS = ("bitcast", "get-tuple-element", "tuple")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)")


def peak_bytes(text: str) -> int:
    """Returns the largest size of all results that are alive together.

    Args:
        text: A scheduled module, from `experimental_get_compiler_ir`. Arguments
            and constants are not counted.
    """
    entry = text[text.index("\nENTRY ") :]
    lines = entry[: entry.index("\n}")].splitlines()[2:]
    buffers: dict[str, set[str]] = {}
    sizes, last_use = {}, {}
    for time, line in enumerate(lines):
        name, shape, operation, rest = _INSTRUCTION.match(line).groups()
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        used = {b for operand in operands for b in buffers[operand]}
        buffers[name] = used if operation in _VIEWS else {name}
        outside = operation in (*_VIEWS, "parameter", "constant")
        sizes[name] = 0 if outside else _size(shape)
        for buffer in used | buffers[name]:
            last_use[buffer] = time
        last = buffers[name]
    for buffer in last:  # The results of the module.
        last_use[buffer] = len(lines)
    alive = [0] * (len(lines) + 1)
    for time, name in enumerate(sizes):
        for later in range(time, last_use.get(name, time) + 1):
            alive[later] += sizes[name]
    return max(alive)


def _size(shape: str) -> int:
    total = 0
    for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        size = _BYTES[dtype]
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += size
    return total
