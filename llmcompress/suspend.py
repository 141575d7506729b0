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

Rounding = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Stop:
    """Where forwards of a block wait: the matrices of one input group and the norm that writes their input.

    Attributes:
        readers: in calling order; the first one called is where a forward waits.
        norm: the producing norm, if its fold was verified.
    """

    readers: Sequence[nn.Module]
    norm: nn.Module | None


class BlockPass:
    """All micro-batches on their way through one block, stopping once at each input group.

    Where ``rounding`` has an entry for a stop, the inputs of its readers are rounded on their way; where
    ``output_rounding`` has one for a module, its outputs.

    Two ways with the same result. Suspended: every forward keeps its live tensors while it waits, so each
    micro-batch runs once. Replayed: a forward is run from the block's start to the stop and dropped, which takes
    about 2.5 forwards and the memory of one micro-batch.

    Args:
        block: loaded.
        stops: in calling order.
        forwards: each waits in front of the block.
        replay: which of the two ways.
        ahead: send copies of the forwards, which end with the block; the forwards themselves stay in front of it.
        last: nobody reads what the block returns: the forwards end where the last stop has been served.
        agreed: told the first stop at which a forward waits, None if none does, it says where to stop: that one, or an
            earlier one at which another process's forwards wait.
    """

    def __init__(
        self,
        block: nn.Module,
        stops: Sequence[Stop],
        forwards: Sequence[SuspendedForward],
        replay: bool,
        ahead: bool = False,
        last: bool = False,
        agreed: Callable[[int | None], int | None] = lambda stop: stop,
    ) -> None:
        self.block, self.stops, self.forwards = block, stops, forwards
        self.replay, self.is_ahead, self.is_last, self._agreed = replay, ahead, last, agreed
        self.served: set[int] = set()
        self.rounding: dict[int, Rounding] = {}
        self.output_rounding: dict[nn.Module, Rounding] = {}
        self._norm_inputs: dict[tuple[int, int], Tensor] = {}

    def arrivals(self) -> Iterator[tuple[int, list[AtMatrix]]]:
        """Yields (number of the stop, the places of all micro-batches that wait there), earliest first.

        The caller decides about the matrices of the stop before it asks for the next one. When the iterator ends,
        all forwards have left the block.
        """
        with self._hooks():
            yield from self._replayed() if self.replay else self._suspended()

    def finish(self, rounding: dict[int, Rounding], outputs: dict[nn.Module, Rounding] | None = None) -> None:
        """Goes through without a stop, rounding the inputs of each group, and the outputs of matrices, as given."""
        self.served, self.rounding = set(range(len(self.stops))), rounding
        self.output_rounding = outputs or {}
        for _ in self.arrivals():
            raise AssertionError("stopped at a served group")

    def _suspended(self) -> Iterator[tuple[int, list[AtMatrix]]]:
        travellers = [f.ahead(self.block) for f in self.forwards] if self.is_ahead else self.forwards
        for forward in travellers:
            forward.resume()
        while (stop := self._next_stop([f.place for f in travellers])) is not None:
            here = [f for f in travellers if isinstance(f.place, AtMatrix) and f.place.group == stop]
            places = [f.place for f in here if isinstance(f.place, AtMatrix)]
            ends = self.is_last and stop == len(self.stops) - 1
            for forward in self.forwards if ends else ():  # all that they hold is free, but for the places
                forward.abandon()
            yield stop, places
            self.served.add(stop)
            if ends:
                break
            for forward in here:
                forward.resume()
        for forward in self.forwards if self.is_last else ():
            forward.abandon()

    def _replayed(self) -> Iterator[tuple[int, list[AtMatrix]]]:
        while len(self.served) < len(self.stops):
            ways = [forward.ahead(self.block).resume() for forward in self.forwards]
            if (stop := self._next_stop(ways)) is None:
                break
            yield stop, [place for place in ways if isinstance(place, AtMatrix) and place.group == stop]
            self.served.add(stop)
        for forward in self.forwards if self.is_last or not self.is_ahead else ():
            forward.abandon() if self.is_last else forward.resume()

    def _next_stop(self, places: Sequence[Place | None]) -> int | None:
        """The first one at which somebody waits, here or in another process; None if nobody does."""
        return self._agreed(min((place.group for place in places if isinstance(place, AtMatrix)), default=None))

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        hooks = []
        for number, stop in enumerate(self.stops):
            hooks += [reader.register_forward_pre_hook(self._on_matrix(number)) for reader in stop.readers]
            hooks += [reader.register_forward_hook(self._round_output) for reader in stop.readers]
            if stop.norm is not None:
                hooks.append(stop.norm.register_forward_pre_hook(self._on_norm(number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._norm_inputs.clear()

    def _round_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rounding = self.output_rounding.get(module)
        return None if rounding is None else rounding(output)

    def _on_norm(self, number: int) -> Callable[..., None]:
        def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
            if number not in self.served:
                self._norm_inputs[id(greenlet.getcurrent()), number] = args[0]

        return remember

    def _on_matrix(self, number: int) -> Callable[..., Any]:
        def wait_then_round(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if number not in self.served:
                suspend(AtMatrix(number, args[0], self._norm_inputs.pop((id(greenlet.getcurrent()), number), None)))
            rounding = self.rounding.get(number)
            return None if rounding is None else (rounding(args[0]), *args[1:])

        return wait_then_round
