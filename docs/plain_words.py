"""For the reference: what Sphinx would make of a docstring's roles and literal blocks, in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
_LITERAL = re.compile(r"\s*::[ \t]*$", re.MULTILINE)
_TREE = re.compile(r"^(?! ).+(?:\n *[├└│].*)+", re.MULTILINE)
_CONSTANT = re.compile(r"DEFAULTS\.\w+")


def _in_code(found: re.Match[str]) -> str:
    return f"```text\n{found.group()}\n```"


class PlainWords(griffe.Extension):
    """Names of classes and functions become code, code blocks begin with a colon or nothing, trees are code blocks."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute that was read."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")
            text = _LITERAL.sub(lambda found: "" if found.group()[0].isspace() else ":", text)
            obj.docstring.value = _TREE.sub(_in_code, text)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for each class: one that is made by ``__new__`` alone shows that one's parameters."""
        made = cls.members.get("__new__")
        if "__init__" not in cls.members and isinstance(made, griffe.Function):
            cls.set_member("__init__", griffe.Function("__init__", parameters=made.parameters, returns=made.returns))

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for each function: private parameters are left out, and named defaults are shown as their values."""
        for parameter in list(func.parameters):
            if parameter.name.startswith("_"):
                del func.parameters[parameter.name]
            elif _CONSTANT.fullmatch(str(parameter.default)):
                parameter.default = func.module[str(parameter.default)].value
