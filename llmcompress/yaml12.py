"""YAML as recipes are written in it: version 1.2's numbers, no aliases, no objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import UserError

#: bytes; the packaged recipes have a few hundred
_LARGEST = 1 << 20


def read_tree(path: Path) -> object:
    """What a recipe's file holds.

    Raises:
        UserError: not readable as YAML.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST >> 20} MiB")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise UserError(
            f"not readable as YAML: {_one_line(error)}", str(path), "compare with configs/jsq.yaml"
        ) from None


def parse_value(text: str) -> object:
    """A value from the command line, read as the recipe files are: ``0.5``, ``2:4``, ``int8``, ``[0, 4e-5]``."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"'{text}' is not readable: {_one_line(error)}", "--set", "quote it as YAML would") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 4e-5 is a number and 2:4 is not (YAML 1.1 reads it in base 60). No aliases: a few lines of
    them stand for billions of values, or for a list that holds itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf)$|\.(nan|NaN)$"),
    list("-+0123456789."),
)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
