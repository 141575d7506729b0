"""Several processes that share one run, started by ``torchrun`` or ``accelerate launch``: gloo on CPUs, NCCL on GPUs.

Each takes its share of the calibration rows through the whole model. They agree on the next input group, which may be
that of an expert that the rows of some of them do not reach. There the statistics of all are added up, so that all
decide on the same sums; where the steps decide about each output row for itself, each process solves its share of the
rows and the results are gathered, elsewhere all solve the same. Statistics of raw rows are gathered, not summed. One
process, the first, writes.

Against one process the sums are added in another order: float32 rounding apart (a relative 1e-6 of a statistic) the
decisions are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmcompress.core.grid import Levels, QuantizedWeight
from llmcompress.core.group import Matrix, MatrixGroup, Method, run_methods
from llmcompress.core.stats import InputStats
from llmcompress.errors import Fault

#: how long one process waits for another, which may be compressing a large group alone
PATIENCE = timedelta(hours=2)
_NOWHERE = 2**62


class Team:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def assembled(device: str) -> Team:
        """All processes that the launcher's environment tells of; one alone without a launcher."""
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if size == 1:
            return Team()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        return Team(rank, size)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of (N, …) rows or of a matrix; none of it if there are fewer than processes."""
        return rows.tensor_split(self.size)[self.rank]

    def told(self, value: Any = None) -> Any:
        """What the first process says."""
        box = [value]
        if self.size > 1:
            self._reach(lambda: dist.broadcast_object_list(box))
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            self._reach(dist.barrier)

    def total(self, number: int) -> int:
        """Sum over all processes."""
        return int(self.added(torch.tensor(number)))

    def added(self, sums: Tensor) -> Tensor:
        """Sums over all processes, entry by entry."""
        if self.size == 1:
            return sums
        found = self._there(sums)
        self._reach(lambda: dist.all_reduce(found))
        return found

    def earliest(self, place: int | None) -> int | None:
        """The least of the numbers that the processes give; None if none gives one."""
        if self.size == 1:
            return place
        found = self._there(torch.tensor(_NOWHERE if place is None else place))
        self._reach(lambda: dist.all_reduce(found, dist.ReduceOp.MIN))
        return None if int(found) == _NOWHERE else int(found)

    def merge(self, stats: InputStats) -> None:
        """Makes the statistics those of all processes' rows."""
        if self.size == 1:
            return
        stats.count = self.total(stats.count)
        how = {"absmax": dist.ReduceOp.MAX, "high": dist.ReduceOp.MAX, "low": dist.ReduceOp.MIN}
        for kind, found in stats.sums.items():
            self._reach(partial(dist.all_reduce, found, how.get(kind, dist.ReduceOp.SUM)))
        if "rows" in stats.needs:
            stats.rows = self.gathered_parts(stats.rows)

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows (n, …) of all processes, which may have different numbers of them, in order."""
        if self.size == 1:
            return rows
        lengths = self._told_by_all(len(rows))
        longest = max(lengths)
        plain = (rows.view(torch.uint8) if rows.dtype == torch.bool else rows).contiguous()
        if len(rows) < longest:
            plain = torch.cat([plain, plain.new_zeros(longest - len(rows), *rows.shape[1:])])
        joined = plain.new_empty(self.size * longest, *rows.shape[1:])
        self._reach(lambda: dist.all_gather_into_tensor(joined, plain))
        if min(lengths) < longest:
            parts = joined.split(longest)
            joined = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return joined.view(rows.dtype)

    def gathered_parts(self, parts: list[Tensor]) -> list[Tensor]:
        """The tensors of all processes, of any lengths, in order."""
        lengths: list[list[int]] = [[]] * self.size
        self._reach(lambda: dist.all_gather_object(lengths, [len(part) for part in parts]))
        joined = self.gathered(torch.cat(parts))
        return list(joined.split([n for each in lengths for n in each]))

    def run(self, methods: tuple[Method, ...], group: MatrixGroup, stats: InputStats) -> None:
        """`run_methods` on statistics that all have, the output rows shared out where that is the same."""
        fewest = min(len(matrix.weight) for matrix in group)
        if self.size == 1 or fewest < self.size or not all(method.by_rows for method in methods):
            run_methods(methods, group, stats)
            return
        mine = group.trial(self.share)
        run_methods(methods, mine, stats)
        for matrix, part in zip(group, mine, strict=True):
            self._join(matrix, part)
        group.activations, group.activation_levels = mine.activations, mine.activation_levels
        group.figures, group.warnings = mine.figures, mine.warnings

    def _join(self, matrix: Matrix, part: Matrix) -> None:
        matrix.weight = self.gathered(part.weight)
        matrix.keep = None if part.keep is None else self.gathered(part.keep)
        matrix.unrounded = None if part.unrounded is None else self.gathered(part.unrounded)
        matrix.outputs = part.outputs
        if (found := part.quantized) is not None:
            zero = found.levels.zero_point
            levels = Levels(self.gathered(found.levels.scale), None if zero is None else self.gathered(zero))
            matrix.quantized = QuantizedWeight(self.gathered(found.codes), levels, found.grid)

    def _told_by_all(self, number: int) -> list[int]:
        """The numbers that the processes give, in order."""
        numbers = self._there(torch.zeros(self.size, dtype=torch.int64))
        numbers[self.rank] = number
        return [int(n) for n in self.added(numbers)]

    def _there(self, number: Tensor) -> Tensor:
        """Where the processes can reach it: NCCL knows tensors on GPUs alone."""
        return number.cuda() if dist.get_backend() == "nccl" else number

    def _reach(self, call: Callable[[], object]) -> None:
        """Raises Fault if another process has ended."""
        try:
            call()
        except RuntimeError as error:
            raise Fault("another process of this run has ended", f"process {self.rank} of {self.size}",
                        "see what that one said") from error  # fmt: skip


ALONE = Team()
