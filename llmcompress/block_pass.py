"""The micro-batches' way through one block, with a stop at each input group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from llmcompress.suspend import AtMatrix, Place, SuspendedForward, suspend

Rounding = Callable[[Tensor], Tensor]


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
        self._rounded: tuple[Tensor, int, Tensor] | None = None  # inputs, their version, and what became of them

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
            self._rounded = None

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
            return None if rounding is None else (self._round_once(number, module, args[0], rounding), *args[1:])

        return wait_then_round

    def _round_once(self, number: int, reader: nn.Module, x: Tensor, rounding: Rounding) -> Tensor:
        """Rounded ``x``, remembered from the first reader that a forward calls to the last one."""
        if self._rounded is not None and self._rounded[0] is x and self._rounded[1] == x._version:
            rounded = self._rounded[2]
        else:
            rounded = rounding(x)
        self._rounded = None if reader is self.stops[number].readers[-1] else (x, x._version, rounded)
        return rounded
