"""Forwards whose hidden states lie on disk while they wait in front of a block: less memory, the same bytes.

They lie in a file without a name, which goes when its process does: whoever empties the folder, be it another process
of the run while this one still writes, neither meets nor disturbs it.

A tensor's storage is emptied where it is, so that whoever refers to it, deep in a forward that is suspended, refers to
it still when it is filled again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.suspend import AtBlock, Place, Returned, SuspendedForward


class Parking:
    """A file without a name.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open for as long as the forwards live
        self._end = 0

    def reserve(self, size: int) -> int:
        """Where so many bytes may lie that nobody else has."""
        place, self._end = self._end, self._end + size
        return place

    def write(self, place: int, memory: memoryview) -> None:
        """Puts bytes there."""
        self._file.seek(place)
        while memory:
            memory = memory[self._file.write(memory) :]

    def read(self, place: int, memory: memoryview) -> None:
        """Fills memory with the bytes that were put there."""
        self._file.seek(place)
        while memory:
            memory = memory[self._file.readinto(memory) :]


class ParkedForward(SuspendedForward):
    """A forward that waits with its hidden states in a file; they are read back whenever somebody needs them.

    Args:
        forward: as `SuspendedForward` takes it.
        parking: the file.
    """

    def __init__(self, forward: Callable[[], Any], parking: Parking) -> None:
        super().__init__(forward)
        self._parking, self._place, self._room = parking, 0, 0
        self._passing = False
        self._parked: Tensor | None = None
        self._written: Tensor | None = None

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._wake()
        return super().call

    def ahead(self, block: nn.Module) -> SuspendedForward:
        ahead = super().ahead(block)  # on copies
        self._park()
        return ahead

    def resume(self, answer: Returned | None = None) -> Place | None:
        self._wake()
        self._written = None
        place = super().resume(answer)
        self._park()
        return place

    def skip(self, blocks: int, value: Any) -> None:
        self._passing = True  # in front of blocks where it does not wait
        super().skip(blocks, value)
        self._passing = False
        self._park()

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._wake()
        yield
        self._park()

    def _park(self) -> None:
        hidden = self.place.args[0] if isinstance(self.place, AtBlock) and self.place.args else None
        if self._passing or not isinstance(hidden, Tensor) or not _owns_its_storage(hidden):
            return
        if self._written is not hidden:
            self._write(_memory(hidden.detach().cpu()))
        hidden.untyped_storage().resize_(0)
        self._parked = self._written = hidden

    def _wake(self) -> None:
        hidden, self._parked = self._parked, None
        if hidden is None:
            return
        hidden.untyped_storage().resize_(hidden.numel() * hidden.itemsize)
        read = hidden if hidden.device.type == "cpu" else torch.empty_like(hidden, device="cpu")
        self._parking.read(self._place, _memory(read))
        if read is not hidden:
            hidden.copy_(read)

    def _write(self, memory: memoryview) -> None:
        if len(memory) > self._room:
            self._place, self._room = self._parking.reserve(len(memory)), len(memory)
        self._parking.write(self._place, memory)


def parked_in(folder: Path) -> Callable[[Callable[[], Any]], SuspendedForward]:
    """Makes forwards that share a file on the disk of a folder."""
    parking = Parking(folder)
    return lambda forward: ParkedForward(forward, parking)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU. (A tensor that numpy has seen cannot be emptied any more.)"""
    return memoryview((ctypes.c_char * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr()))


def _owns_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize > 0
