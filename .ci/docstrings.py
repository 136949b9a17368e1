"""Docstrings for the site: an entry each where one line of `Args` or `Attributes` describes several names.

Our docstrings write ``low, high: the bounds.`` and ``low: the bound. high: the other one.``; the reader of Google's
style knows one name a line, and would say that there is no parameter of such a name.
"""

import re
from collections.abc import Collection

import griffe

SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: {4}.*)?(?:\n|$))+", re.MULTILINE)
ITEM = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n {5,}.*)*)", re.MULTILINE)


def one_name_a_line(text: str, names: Collection[str]) -> str:
    """The docstring with one entry a name.

    Args:
        names: what a name in the middle of a line has to be of.
    """
    inner = re.compile(rf"(?<=\.) ({'|'.join(map(re.escape, sorted(names))) or '(?!)'}): ")

    def split(item: re.Match[str]) -> str:
        first, *more = inner.split(" ".join(item["text"].split()))
        parts = [(name, first) for name in item["names"].split(", ")] + list(zip(more[::2], more[1::2], strict=True))
        return "\n".join(f"    {name}: {text}" for name, text in parts)

    return SECTION.sub(lambda section: ITEM.sub(split, section[0]), text)


class OneNameALine(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_function_instance(self, *, func: griffe.Function, **given: object) -> None:
        """Names are parameters."""
        if func.docstring is not None:
            func.docstring.value = one_name_a_line(func.docstring.value, {one.name for one in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **given: object) -> None:
        """Names are attributes, or parameters of `__init__`."""
        if cls.docstring is not None:
            initial = cls.members.get("__init__")
            parameters = {one.name for one in initial.parameters} if isinstance(initial, griffe.Function) else set()
            cls.docstring.value = one_name_a_line(cls.docstring.value, parameters | set(cls.members))
