"""Prepares docstrings for the API reference."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"[A-Z][a-z]+:$")


class Docstrings(griffe.Extension):
    """Makes sections of the examples in docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _with_examples(obj.docstring.value)


def _with_examples(text: str) -> str:
    """Returns a docstring whose doctests are in a section `Examples`.

    The parser knows the plural only, and wants its lines indented.
    """
    lines = []
    inside = False
    for line in text.split("\n"):
        if line in ("Example:", "Examples:"):
            inside = True
            line = "Examples:"
        elif _SECTION.match(line):
            inside = False
        elif inside and line.strip() and not line.startswith("    "):
            line = f"    {line}"
        lines.append(line)
    return "\n".join(lines)
