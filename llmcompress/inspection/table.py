"""An inspection for a terminal: a line per block, what stands out, what reads what, and the verdict."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from statistics import median_low

from llmcompress.inspection.figures import MatrixFigures
from llmcompress.inspection.inspect import Inspection
from llmcompress.inspection.verdict import Finding, Verdict
from llmcompress.survey import group_lines
from llmcompress.table import aligned, bytes_text

#: what a check is about, in the order they are told
CHECKS = {
    "files": "",
    "hashes": "{} files have the recorded SHA-256",
    "index": "{} tensors are where the index says",
    "transformers": "transformers finds a tensor for every parameter",
    "config": "{} agreements of tensors, quantization_config and recipe",
    "scales": "{} tensors of scales are finite and positive",
    "grid": "{} tensors of codes lie inside their grid",
    "second opinion": "{} matrices decode alike by compressed-tensors",
    "finite": "{} tensors are free of NaN and infinity",
    "record": "{} matrices have the recorded shape",
    "zeros": "{} matrices have the recorded number of zeros",
    "masks": "{} masks are exact",
    "bits": "{} matrices take the recorded bits",
    "recipe": "the recipe is the recorded one",
    "report": "{} entries of report.json agree with record and tensors",
    "card": "{} figures of the card are those of report.json",
}
_SHOWN = 40
#: above this many, blocks that are alike are told as one
_BLOCKS_APART = 16
#: how far from the median of its kind a matrix stands out
_OUTLIER_FACTOR, _SPARSITY_STEP, _BITS_STEP = 2.0, 0.05, 0.5


def text(found: Inspection, every: bool = False, colour: bool = False) -> str:
    """The whole inspection.

    Args:
        found: what to tell.
        every: a line per matrix instead of one per block.
        colour: mark what is wrong and what holds with a terminal's colours.
    """
    groups = group_lines(found.blocks)
    parts = [
        f"{found.folder}   {bytes_text(found.size_bytes)}",
        aligned(matrix_rows(found.matrices) if every else block_rows(found.matrices)),
        "\n".join(["input groups", *groups]) if groups else "",
        verdict_text(found.verdict, found.compressed, colour),
    ]
    return "\n\n".join(part for part in parts if part)


def block_rows(matrices: list[MatrixFigures]) -> list[list[str]]:
    """A row per block, one for all matrices outside them, and one for the sum; the first has the titles."""
    if not matrices:
        return []
    notes = standing_out(matrices)
    rows = [["block", "matrices", "bytes", "bits", "zeros", "row outlier", "column", "stands out"]]
    blocks: dict[str, list[MatrixFigures]] = defaultdict(list)
    for figures in matrices:
        blocks[figures.block].append(figures)
    for alike in _runs(blocks, notes) if len(blocks) > _BLOCKS_APART else [[block] for block in blocks]:
        first, last = alike[0], alike[-1]
        told = [f"{m.name.removeprefix(first + '.')} {notes[m.name]}" for m in blocks[first] if m.name in notes]
        more = f", and {len(told) - 2} more" if len(told) > 2 else ""
        name = first or "outside the blocks"
        name += f" … {last.rpartition('.')[2]} ({len(alike)} blocks, each)" if len(alike) > 1 else ""
        sums = _sums(blocks[first])
        sums[-2:] = [max((_sums(blocks[block])[place] for block in alike), key=float) for place in (-2, -1)]
        rows.append([name, *sums, ", ".join(told[:2]) + more])
    if len(blocks) > 1:
        rows.append(["all", *_sums(matrices), ""])
    return rows


def _runs(blocks: dict[str, list[MatrixFigures]], notes: dict[str, str]) -> list[list[str]]:
    """Blocks in order, those side by side that differ in outliers only, and in which nothing stands out, together."""
    runs: list[list[str]] = []
    before: list[str] | None = None
    for block, own in blocks.items():
        said = None if not block or any(m.name in notes for m in own) else _sums(own)[:-2]
        if said is not None and said == before:
            runs[-1].append(block)
        else:
            runs.append([block])
        before = said
    return runs


def matrix_rows(matrices: list[MatrixFigures]) -> list[list[str]]:
    """A row per matrix."""
    notes = standing_out(matrices)
    rows = [["matrix", "out × in", "stored as", "bytes", "bits", "zeros", "row outlier", "column", "stands out"]]
    for m in matrices:
        shape = f"{m.shape[0]} × {m.shape[1]}"
        rows.append([m.name, shape, m.format, bytes_text(m.bytes), *_figures([m]), notes.get(m.name, "")])
    return rows if len(rows) > 1 else []


def standing_out(matrices: list[MatrixFigures]) -> dict[str, str]:
    """By name, in what a matrix is far from the median of its kind, such as all ``mlp.down_proj``."""
    kinds: dict[str, list[MatrixFigures]] = defaultdict(list)
    for figures in matrices:
        kinds[re.sub(r"\b\d+\b", "*", figures.name)].append(figures)
    notes: dict[str, str] = {}
    for same in kinds.values():
        bits, zeros = median_low(m.bits for m in same), median_low(m.sparsity for m in same)
        row, column = (median_low(getattr(m, f"{axis}_outlier") for m in same) for axis in ("row", "column"))
        for m in same:
            told = [
                f"{m.bits:.2f} bits" if abs(m.bits - bits) > _BITS_STEP else "",
                f"{m.sparsity:.1%} zeros" if abs(m.sparsity - zeros) > _SPARSITY_STEP else "",
                f"row {m.row_outlier:.0f}" if m.row_outlier > _OUTLIER_FACTOR * row else "",
                f"column {m.column_outlier:.0f}" if m.column_outlier > _OUTLIER_FACTOR * column else "",
            ]
            if any(told):
                notes[m.name] = " ".join(filter(None, told))
    return notes


def verdict_text(verdict: Verdict, compressed: bool, colour: bool) -> str:
    """What holds, what could not be checked, and a table of what is wrong."""
    paint = _painter(colour)
    failed = {finding.check for finding in verdict.wrong}
    lines = ["verified" if compressed else "checked"]
    for check, what in CHECKS.items():
        if what and verdict.held[check] and check not in failed:
            lines.append(f"  {paint('✓', 32)} {what.format(verdict.held[check])}")
    lines += [f"  {paint('–', 33)} not checked: {what}" for what in verdict.unchecked]
    if verdict.wrong:
        lines += [
            "",
            paint(f"WRONG: {_count(len(verdict.wrong), 'thing is', 'things are')} not as the folder says", 31),
        ]
        lines += _wrong_rows(verdict.wrong)
    else:
        lines.append("everything that was checked holds")
    return "\n".join(lines)


def _wrong_rows(wrong: list[Finding]) -> list[str]:
    order = {check: place for place, check in enumerate(CHECKS)}
    told = sorted(wrong, key=lambda finding: order[finding.check])[:_SHOWN]
    rows = [[finding.check, finding.where, finding.what] for finding in told]
    left = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {check:<{left[0]}}  {where:<{left[1]}}  {what}" for check, where, what in rows]
    more = len(wrong) - len(told)
    return [*lines, f"  … and {more} more (--json has all)"] if more else lines


def _sums(matrices: list[MatrixFigures]) -> list[str]:
    return [str(len(matrices)), bytes_text(sum(m.bytes for m in matrices)), *_figures(matrices)]


def _figures(matrices: list[MatrixFigures]) -> list[str]:
    weights = max(sum(m.weights for m in matrices), 1)
    bits, zeros = sum(m.bits * m.weights for m in matrices) / weights, sum(m.zeros for m in matrices) / weights
    outliers = (max(getattr(m, f"{axis}_outlier") for m in matrices) for axis in ("row", "column"))
    return [f"{bits:.2f}", f"{zeros:.1%}", *(f"{ratio:.1f}" for ratio in outliers)]


def _painter(colour: bool) -> Callable[[str, int], str]:
    return lambda word, code: f"\x1b[{code}m{word}\x1b[0m" if colour else word


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
