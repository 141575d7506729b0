"""Forwards that stop where someone wants to look, and go on when told.

A forward runs in a greenlet. `suspend` inside it hands a place to whoever resumed it, and returns what the next
`resume` brings. So a whole model can wait at a block, and a block at each of its matrices, without a line of
architecture-specific code, and every tensor computed so far stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmcompress.errors import UserError


@dataclass(frozen=True)
class AtBlock:
    """The model's loop is about to call a block with these arguments."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class AtMatrix:
    """A block is about to multiply ``x`` (..., in) by the first matrix of an input group.

    Attributes:
        group: number of the group within the block.
        x: what the matrices read; rewriting it in place reaches all of them.
        norm_input: what the producing norm read, where its fold was verified.
    """

    group: int
    x: Tensor
    norm_input: Tensor | None


Place = AtBlock | AtMatrix


@dataclass(frozen=True)
class Returned:
    """What a block that is not run again returns to the model's loop."""

    value: Any


class SuspendedForward:
    """One forward that can be resumed until it is done.

    Attributes:
        place: where it waits; None once it has ended.
        result: what the forward returned, once it has ended.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self._greenlet = greenlet(forward)
        self.place: Place | None = None
        self.result: Any = None

    @property
    def done(self) -> bool:
        """Whether the forward has returned."""
        return bool(self._greenlet.dead)

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the block call the forward waits at.

        Raises:
            UserError: it does not wait at a block.
        """
        if not isinstance(self.place, AtBlock):
            raise UserError("its forward does not call its blocks one after the other", "model", "it is not supported")
        return self.place.args, self.place.kwargs

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While open, what the forward holds is in memory."""
        yield

    def ahead(self, block: nn.Module) -> SuspendedForward:
        """A forward of its own that runs the ``block`` this one waits at, on the same arguments, and ends with it."""
        args, kwargs = self.call
        copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # blocks may write into their arguments
        return SuspendedForward(lambda: type(block).forward(block, *copies, **kwargs))

    def abandon(self) -> None:
        """Ends it where it waits, and frees what it holds."""
        self.place = None
        if not self.done:
            self._greenlet.throw()

    def resume(self, answer: Returned | None = None) -> Place | None:
        """Runs to the next place and returns it; None when the forward has ended. Exceptions come through.

        Args:
            answer: in place of the block that the forward waits at, which is not run.
        """
        self.place = None
        outcome = self._greenlet.switch() if answer is None else self._greenlet.switch(answer)
        if self.done:
            self.result = outcome
        else:
            self.place = outcome
        return self.place

    def skip(self, blocks: int, value: Any) -> None:
        """From the first block on past some that need not run again, the last of which returns ``value``."""
        for _ in range(blocks):
            self.resume(Returned(tree_map(_copy, value)))  # the next block may write into it


class Returns:
    """Remembers what blocks return to each forward, from when it is opened on.

    Args:
        blocks: their calls are watched.
        copied: keep copies, as the next block may write into its input; otherwise take them before it does.
    """

    def __init__(self, blocks: Sequence[nn.Module], copied: bool = True) -> None:
        self._blocks, self._copied = blocks, copied
        self._found: dict[greenlet, Any] = {}

    def __enter__(self) -> Returns:
        self._hooks = [block.register_forward_hook(self._remember) for block in self._blocks]
        return self

    def __exit__(self, *failure: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._found.clear()

    def take(self, forwards: Sequence[SuspendedForward]) -> list[Any]:
        """What the block each forward left last returned to it. It is held here no longer."""
        return [self._found.pop(forward._greenlet) for forward in forwards]

    def _remember(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._found[greenlet.getcurrent()] = tree_map(_copy, output) if self._copied else output


def _copy(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) else part


def suspend(place: Place) -> object:
    """Called inside a `SuspendedForward`: waits here until it is resumed; returns what it is resumed with."""
    return greenlet.getcurrent().parent.switch(place)


@contextmanager
def gates(blocks: list[nn.Module]) -> Iterator[None]:
    """While open, every forward that reaches a block waits there, as `AtBlock`, before it runs the block."""

    def gate(index: int, block: nn.Module) -> Callable[..., Any]:
        def wait_then_run(*args: Any, **kwargs: Any) -> Any:
            answer = suspend(AtBlock(index, args, kwargs))
            return answer.value if isinstance(answer, Returned) else type(block).forward(block, *args, **kwargs)

        return wait_then_run

    for index, block in enumerate(blocks):
        block.forward = gate(index, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
