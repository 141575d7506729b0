"""A few tokens on their way through a model, block by block: which matrices read one tensor, and whether a scale of it
folds into the norm that wrote it. Only one block is in memory at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from llmcompress.lane import PROBE_TOKENS
from llmcompress.measure import release_freed_memory
from llmcompress.model.groups import BlockMap, InputGroup, map_block
from llmcompress.model.load import Block, BlockwiseModel
from llmcompress.suspend import gates


@dataclass
class PlannedGroup:
    """One input group: the matrices that will be compressed, and whether smoothing can be folded."""

    matrices: list[str]
    left_dense: list[str]
    width: int
    fold: str


@torch.no_grad()
def survey(model: BlockwiseModel) -> Iterator[tuple[Block, BlockMap]]:
    """Each block with its weights, which are freed when the next one is asked for, and what it consists of."""
    with gates([block.module for block in model.blocks]):
        vocabulary = model.model.config.get_text_config().vocab_size
        probe = model.start_forwards([torch.arange(PROBE_TOKENS)[None] % vocabulary])[0]
        for index in range(len(model.blocks)):
            block = model.load_block(index)
            found = map_block(block, probe.call)
            probe.resume()
            yield block, found
            del found
            model.release_block(index)
            release_freed_memory()


def planned(group: InputGroup, targeted: Collection[str]) -> PlannedGroup:
    """A group as it is told, its matrices divided into those that are targeted and the others."""
    names = [m.name for m in group.matrices]
    fold = f"into {type(group.fold.norm).__name__}" if group.fold else f"refused: {group.fold_refusal}"
    return PlannedGroup([n for n in names if n in targeted], [n for n in names if n not in targeted], group.width, fold)


def group_lines(blocks: Mapping[str, list[PlannedGroup]]) -> list[str]:
    """The groups of each block for the terminal. Blocks with the same groups are told once."""
    lines: list[str] = []
    told: dict[str, list[str]] = {}
    for block, groups in blocks.items():
        told.setdefault("\n".join(_described(block, groups)), []).append(block)
    for description, names in told.items():
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} blocks)"
        lines += [span, description]
    return lines


def _described(block: str, groups: list[PlannedGroup]) -> list[str]:
    """A line per group, one for those that differ in numbers only, as experts do."""
    kinds: Counter[tuple[str, int, str]] = Counter()
    firsts: dict[tuple[str, int, str], str] = {}
    for group in groups:
        own = ", ".join(
            [name.removeprefix(block + ".") for name in group.matrices]
            + [name.removeprefix(block + ".") + " (left dense)" for name in group.left_dense]
        )
        kind = re.sub(r"\.\d+(?=\.|$|,)", ".*", own), group.width, group.fold
        kinds[kind] += 1
        firsts.setdefault(kind, own)
    lines = []
    for (names, width, fold), number in kinds.items():
        can = "can fold " if fold.startswith("into") else ""
        own = firsts[names, width, fold] if number == 1 else f"{names} ({number} times)"
        lines.append(f"  {own:58s} {width:6d} inputs   smoothing {can}{fold}")
    return lines
