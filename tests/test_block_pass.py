"""Suspended forwards compute what plain ones compute, and wait where they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcompress.block_pass import BlockPass, Stop
from llmcompress.suspend import AtBlock, AtMatrix, SuspendedForward, gates, suspend


class Gated(nn.Module):
    """norm → (gate, up) → down, the shape of a decoder's MLP, with one norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.norm(x)
        return x + self.down(torch.tanh(self.gate(h)) * self.up(h))


def build() -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(Gated(), Gated()), [torch.randn(3, 8) for _ in range(4)]


def stops(block: Gated) -> list[Stop]:
    return [Stop([block.gate, block.up], block.norm), Stop([block.down], None)]


@pytest.mark.parametrize("replay", [False, True])
@torch.no_grad()
def test_compressing_on_the_way_equals_a_forward_of_the_compressed_block(replay: bool) -> None:
    model, inputs = build()
    with gates(list(model)):
        forwards = [SuspendedForward(lambda x=x: model(x)) for x in inputs]
        for forward in forwards:
            place = forward.resume()
            assert isinstance(place, AtBlock) and place.index == 0
        for block in model:
            visited = []
            for number, places in BlockPass(block, stops(block), forwards, replay).arrivals():
                visited.append(number)
                assert len(places) == len(inputs)
                for reader in stops(block)[number].readers:
                    reader.weight.mul_(0.5)
            assert visited == [0, 1]
    for forward, x in zip(forwards, inputs, strict=True):
        assert forward.done
        assert torch.equal(forward.result, model(x))


@torch.no_grad()
def test_suspended_blocks_run_once_for_each_micro_batch() -> None:
    model, inputs = build()
    with gates(list(model)):
        forwards = [SuspendedForward(lambda x=x: model(x)) for x in inputs]
        for forward in forwards:
            forward.resume()
        for block in model:
            for _ in BlockPass(block, stops(block), forwards, replay=False).arrivals():
                pass
    assert [block.calls for block in model] == [len(inputs)] * 2


@torch.no_grad()
def test_rewriting_the_waiting_tensor_reaches_every_reader() -> None:
    model, inputs = build()
    block = model[0]
    with gates([block]):
        forward = SuspendedForward(lambda: block(inputs[0]))
        forward.resume()
        for number, places in BlockPass(block, stops(block), [forward], replay=False).arrivals():
            if number == 0:
                assert torch.equal(places[0].norm_input, inputs[0])
                places[0].x.zero_()
    hidden = torch.tanh(block.gate.bias) * block.up.bias
    torch.testing.assert_close(forward.result, inputs[0] + block.down(hidden))


@torch.no_grad()
def test_inputs_are_rounded_only_after_their_group_was_served() -> None:
    model, inputs = build()
    block = model[0]
    with gates([block]):
        forward = SuspendedForward(lambda: block(inputs[0]))
        forward.resume()
        through = BlockPass(block, stops(block), [forward], replay=False)
        for number, places in through.arrivals():
            assert not torch.equal(places[0].x, torch.zeros_like(places[0].x))
            through.rounding[number] = torch.zeros_like
    torch.testing.assert_close(forward.result, inputs[0] + block.down.bias)


@pytest.mark.parametrize("replay", [False, True])
@torch.no_grad()
def test_the_readers_of_a_group_get_the_same_inputs_rounded_once(replay: bool) -> None:
    model, inputs = build()
    block = model[0]

    def coarsely(x: torch.Tensor) -> torch.Tensor:
        return (4 * x).round() / 4

    hidden = [coarsely(block.norm(x)) for x in inputs]
    expected = [coarsely(torch.tanh(block.gate(h)) * block.up(h)) for h in hidden]
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in (block.gate, block.up, block.down)}
    for module, given in seen.items():
        module.register_forward_hook(lambda _, args, output, given=given: given.append(args[0]))
    with gates([block]):
        forwards = [SuspendedForward(lambda x=x: block(x)) for x in inputs]
        for forward in forwards:
            forward.resume()
        through = BlockPass(block, stops(block), forwards, replay)
        for number, _ in through.arrivals():
            through.rounding[number] = coarsely
    assert all(map(torch.equal, seen[block.gate][-4:], hidden))
    assert all(map(torch.equal, seen[block.down][-4:], expected))
    assert all(x is y for x, y in zip(seen[block.gate], seen[block.up], strict=True))


@torch.no_grad()
def test_inputs_rewritten_between_two_readers_are_rounded_anew() -> None:
    model, _ = build()
    block, x = model[0], torch.ones(1, 8)

    def run() -> torch.Tensor:
        block.gate(x)
        x.mul_(3)
        return block.up(x)

    through = BlockPass(block, stops(block), [SuspendedForward(run)], replay=False)
    seen: list[torch.Tensor] = []
    with through._hooks():
        through.served, through.rounding[0] = {0, 1}, lambda x: x + 1
        for reader in (block.gate, block.up):
            reader.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        through.forwards[0].resume()
    assert torch.equal(seen[0], torch.full((1, 8), 2.0)) and torch.equal(seen[1], torch.full((1, 8), 4.0))


@pytest.mark.parametrize("replay", [False, True])
@torch.no_grad()
def test_going_ahead_leaves_the_forward_in_front_and_finishing_rounds_its_inputs(replay: bool) -> None:
    model, inputs = build()
    block = model[0]
    with gates([block]):
        forward = SuspendedForward(lambda: block(inputs[0]))
        forward.resume()
        visited = [number for number, _ in BlockPass(block, stops(block), [forward], replay, ahead=True).arrivals()]
        assert visited == [0, 1]
        assert isinstance(forward.place, AtBlock)
        BlockPass(block, stops(block), [forward], replay).finish({1: torch.zeros_like})
    torch.testing.assert_close(forward.result, inputs[0] + block.down.bias)


@pytest.mark.parametrize("replay", [False, True])
@torch.no_grad()
def test_in_the_last_block_nothing_runs_after_the_last_stop(replay: bool) -> None:
    model, inputs = build()
    block = model[0]
    ran: list[nn.Module] = []
    block.down.register_forward_hook(lambda module, *_: ran.append(module))
    with gates([block]):
        forward = SuspendedForward(lambda: block(inputs[0]))
        forward.resume()
        visited = [number for number, _ in BlockPass(block, stops(block), [forward], replay, last=True).arrivals()]
    assert visited == [0, 1]
    assert forward.done
    assert not ran


def test_hooks_are_returned_and_errors_come_through() -> None:
    model, inputs = build()
    block = model[0]

    def fail() -> None:
        suspend(AtMatrix(0, inputs[0], None))
        raise ValueError("inside")

    forward = SuspendedForward(fail)
    forward.resume()
    with pytest.raises(ValueError, match="inside"):
        forward.resume()
    with pytest.raises(RuntimeError), gates(list(model)):
        raise RuntimeError
    assert "forward" not in vars(block) and not block.gate._forward_pre_hooks
    block(inputs[0])
