"""What transformers does to a network when it loads one: it initializes what it has found no weights for, and so meets
Linears that hold packed codes and no ``weight``."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


def unpacks(network: PreTrainedModel, blocks: Iterable[nn.Module], dense: Iterable[str] = ()) -> bool:
    """Whether transformers can load packed weights of this architecture. Falcon's initialization fails on them.

    Args:
        blocks: of the network, empty; every kind of block should be among them.
        dense: names of the matrices that will not be packed.
    """
    spared = [network.get_submodule(name) for name in dense]
    return not any(_fails(network, block, spared) for block in blocks)


def _fails(network: PreTrainedModel, block: nn.Module, spared: list[nn.Module]) -> bool:
    own = {name for name, module in block.named_modules() if any(module is other for other in spared)}
    twin = copy.deepcopy(block)
    for name, linear in twin.named_modules():
        if not isinstance(linear, nn.Linear) or name in own:
            continue
        linear._parameters = {key: p for key, p in linear._parameters.items() if key != "weight"}
    for module in twin.modules():
        try:
            if not hasattr(module, "visits_all"):  # its stacked tensors are not there, packed or not
                network._init_weights(module)
        except AttributeError as error:
            if "weight" in str(error):
                return True
    return False
