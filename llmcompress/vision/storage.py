"""A compressed network as a folder: codes, scales and what stayed in floating point in one safetensors file, and in
``network.json`` how to put them together again. Codes of less than 8 bits are packed as compressed-tensors does."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor, nn

from llmcompress.core.floats import FLOATS
from llmcompress.core.grid import Levels, QuantGrid, QuantizedWeight
from llmcompress.errors import UserError
from llmcompress.export.destination import DESCRIPTION
from llmcompress.vision.fold import remove_folded, replace_module
from llmcompress.vision.layers import RoundedConv2d, RoundedLinear, Rounding, round_layer
from llmcompress.vision.network import rebuilt

WEIGHTS = "model.safetensors"
VERSION = 1


def stored_network(
    module: nn.Module, origin: dict[str, Any], folded: list[str], dense: nn.Module
) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the text of ``network.json``, from which `load_vision` makes the network.

    Args:
        module: compressed.
        origin: how to build an untrained one, see `Network`.
        folded: names of the norms that folding took away.
        dense: the network it was made from, for which layers have other shapes.
    """
    tensors: dict[str, Tensor] = {}
    rounding: dict[str, Any] = {}
    rounded = {n: m for n, m in module.named_modules() if isinstance(m, RoundedConv2d | RoundedLinear)}
    for name, tensor in module.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        layer = rounded.get(owner)
        if layer is None or attribute != "weight" or layer.rounding.weight is None:
            tensors[name] = tensor
    for name, layer in rounded.items():
        rounding[name] = _described(layer.rounding)
        tensors |= {f"{name}.{key}": value for key, value in _tensors(layer.rounding).items()}
    described = {
        "version": VERSION, "origin": origin, "folded": folded, "layers": _reshaped(module, dense),
        "rounding": rounding,
    }  # fmt: skip
    return tensors, json.dumps(described, indent=2) + "\n"


def load_vision(folder: str | Path, module: nn.Module | None = None) -> nn.Module:
    """A network that this program wrote, in evaluation mode.

    Args:
        folder: of the output.
        module: an untrained (or dense) network of the same kind, where the folder does not say how to build one. It is
            changed in place.

    Raises:
        UserError: not such a folder, or the module is of another kind.
    """
    path = Path(folder)
    try:
        described = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        origin, folded, layers = described["origin"], list(described["folded"]), dict(described["layers"])
        rounding, version = dict(described["rounding"]), described["version"]
        tensors = load_file(path / WEIGHTS)
    except Exception as error:  # files may be damaged in any way
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"is not an output of the vision command ({said})", str(path), "give its folder") from None
    if version != VERSION:
        raise UserError(
            f"is of version {version}, this program reads {VERSION}", str(path), "use the program that wrote it"
        )
    network = (rebuilt(origin) if module is None else module).eval().requires_grad_(False)
    try:
        remove_folded(network, folded)
        for name, groups in layers.items():
            conv: Any = network.get_submodule(name)
            conv.groups = int(groups)
        for name, entry in rounding.items():
            found = _read_rounding(entry, name, tensors)
            if found.weight is not None:
                tensors[f"{name}.weight"] = found.weight.dequantize()
        fill(network, tensors)
        for name, entry in rounding.items():
            replace_module(
                network, name, round_layer(network.get_submodule(name), _read_rounding(entry, name, tensors))
            )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"does not fit the network ({str(error)[:160]})", str(path), "pass the network it was made from"
        ) from None
    return network


def fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives a network tensors of perhaps other shapes, and its layers the widths that follow."""
    own = {name for name in tensors if name.rpartition(".")[2] not in _CODES}
    for name in own:
        owner, _, attribute = name.rpartition(".")
        layer, value = network.get_submodule(owner), tensors[name]
        if attribute in layer._buffers:
            layer._buffers[attribute] = value
            continue
        if attribute == "weight" and isinstance(layer, nn.Conv2d):
            value = value.view(len(value), -1, *layer.kernel_size)
        setattr(layer, attribute, nn.Parameter(value.clone(), requires_grad=False))
    for layer in network.modules():
        set_widths(layer)


def set_widths(layer: nn.Module) -> None:
    """Makes a layer's numbers say what its tensors are."""
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_mean is not None:
        layer.num_features = len(layer.running_mean)


_CODES = ("codes", "codes_packed", "scale", "zero_point", "input_scale", "input_zero")


def _reshaped(module: nn.Module, dense: nn.Module) -> dict[str, int]:
    """Groups of the convolutions that have other numbers of them than in the dense network."""
    before = dict(dense.named_modules())
    convs = {name: layer.groups for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    return {name: groups for name, groups in convs.items() if groups != before[name].groups}


def _described(rounding: Rounding) -> dict[str, Any]:
    weight = rounding.weight
    return {
        "weights": None if weight is None else asdict(weight.grid),
        "columns": None if weight is None else weight.codes.shape[1],
        "inputs": None if rounding.inputs is None else asdict(rounding.inputs),
    }


def _tensors(rounding: Rounding) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if rounding.weight is not None:
        codes, levels, grid = rounding.weight.codes, rounding.weight.levels, rounding.weight.grid
        packs = grid.kind not in FLOATS and grid.bits < 8
        found["codes_packed" if packs else "codes"] = pack_to_int32(codes, grid.bits) if packs else codes.contiguous()
        found["scale"] = levels.scale.contiguous()
        if levels.zero_point is not None:
            found["zero_point"] = levels.zero_point.to(torch.int8).contiguous()
    if rounding.levels is not None:
        found["input_scale"] = rounding.levels.scale.clone()
        if rounding.levels.zero_point is not None:
            found["input_zero"] = rounding.levels.zero_point.to(torch.int8)
    return found


def _read_rounding(entry: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Rounding:
    def zero(key: str) -> Tensor | None:
        found = tensors.get(f"{name}.{key}")
        return None if found is None else found.float()

    weight = None
    if entry["weights"] is not None:
        grid = QuantGrid(**{**entry["weights"], "values": tuple(entry["weights"].get("values", ()))})
        codes = tensors.get(f"{name}.codes")
        if codes is None:
            packed, rows = tensors[f"{name}.codes_packed"], len(tensors[f"{name}.scale"])
            codes = unpack_from_int32(packed, grid.bits, torch.Size((rows, int(entry["columns"]))))
        weight = QuantizedWeight(codes, Levels(tensors[f"{name}.scale"], zero("zero_point")), grid)
    inputs = None if entry["inputs"] is None else QuantGrid(**entry["inputs"])
    scale = tensors.get(f"{name}.input_scale")
    return Rounding(weight, inputs, None if scale is None else Levels(scale, zero("input_zero")))
