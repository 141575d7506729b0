"""A network as this package sees it: a module that turns images into logits, and where it came from."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmcompress.errors import UserError, nearest
from llmcompress.export.destination import DESCRIPTION, RECORD, holds_network
from llmcompress.resources import PACKAGE
from llmcompress.vision.networks import NETWORKS, build


@dataclass
class Network:
    """A classifier of images.

    Attributes:
        name: as the user gave it.
        module: in evaluation mode, float32.
        origin: how to build an untrained one: ``{"network", "arguments"}``, ``{"config"}`` of transformers, or
            ``{"function"}``; empty if only the caller can.
        folder: it was read from; None if from none.
        image_size: of a side, where the description says so; 0 where not.
    """

    name: str
    module: nn.Module
    origin: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    image_size: int = 0

    @property
    def grey(self) -> bool:
        """Whether its first convolution reads one channel."""
        first = next((m for m in self.module.modules() if isinstance(m, nn.Conv2d)), None)
        return first is not None and first.in_channels == 1


def logits(module: nn.Module, x: Tensor) -> Tensor:
    """(N, classes) of images (N, C, H, W), whatever the module wraps them in.

    Raises:
        UserError: the module returns no tensor.
    """
    out = module(x)
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None and isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        found = out[0]
    if not isinstance(found, Tensor):
        raise UserError(
            f"returns {type(out).__name__}", type(module).__name__, "return a tensor, or an object with logits"
        )
    return found


def open_network(model: str) -> Network:
    """The network of ``--model``: ``resnet`` or ``mobilenet`` (bundled), a folder, or ``module:function``.

    Raises:
        UserError: there is none, or it does not fit its weights.
    """
    bundled = PACKAGE / "data" / f"digits-{model}"
    folder = bundled if model in NETWORKS and bundled.is_dir() else Path(model)
    if folder.is_dir():
        if (folder / RECORD).is_file():
            raise UserError("is compressed already", str(folder), "give the dense network")
        found = _from_description(model, folder) if holds_network(folder) else _from_config(model, folder)
        found.folder = folder
    elif ":" in model:
        found = Network(model, call_builder(model), {"function": model})
    else:
        raise UserError(
            "neither a bundled network, a folder nor module:function", f"--model {model}", nearest(model, NETWORKS)
        )
    found.module.eval().requires_grad_(False)
    return found


def rebuilt(origin: dict[str, Any]) -> nn.Module:
    """An untrained network of an origin.

    Raises:
        UserError: it cannot be built here.
    """
    if "network" in origin:
        return build(str(origin["network"]), dict(origin["arguments"]))
    if "function" in origin:
        return call_builder(str(origin["function"]))
    if "config" not in origin:
        raise UserError(
            "was made from a module of the caller's", DESCRIPTION, "pass that module: load_vision(folder, module)"
        )
    from transformers import AutoConfig, AutoModelForImageClassification

    tree = dict(origin["config"])
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))


def call_builder(name: str) -> nn.Module:
    """What ``module:function`` returns; the current folder is searched too.

    Raises:
        UserError: no such function, or it returns no module.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        builder = getattr(importlib.import_module(module), function)
        found = builder()
    except Exception as error:  # code of the user's may fail as it likes
        raise UserError(
            f"cannot be called ({type(error).__name__}: {error})", name, "name a function of no arguments"
        ) from None
    finally:
        sys.path.remove("")
    if not isinstance(found, nn.Module):
        raise UserError(f"returns {type(found).__name__}", name, "return a torch.nn.Module with its weights")
    return found.float()


def _from_description(model: str, folder: Path) -> Network:
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        origin = {"network": str(described["network"]), "arguments": dict(described["arguments"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"is not a description of a network ({error})", str(folder / DESCRIPTION), "compare with a bundled one"
        ) from None
    module = build(origin["network"], origin["arguments"])  # type: ignore[arg-type]
    load_weights(module, _tensors(folder / "model.safetensors"), folder)
    return Network(model, module, origin)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Fills a module; integer buffers such as BatchNorm's counters may be missing.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"weights do not fit the network: {str(error).splitlines()[-1].strip()}", str(folder), ""
        ) from None
    state = module.state_dict()
    lost = [name for name in missing if state[name].is_floating_point()] + list(unexpected)
    if lost:
        raise UserError(f"weights do not fit the network: {lost[0]}", str(folder), "take both from one place")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # the library raises its own kinds for every damage
        raise UserError(f"is not readable ({str(error)[:100]})", str(file), "fetch it again") from None


def _from_config(model: str, folder: Path) -> Network:
    if not (folder / "config.json").is_file():
        raise UserError(f"holds neither {DESCRIPTION} nor config.json", str(folder), "give a folder of a network")
    from transformers import AutoModelForImageClassification

    try:
        module = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # every architecture refuses in its own way
        raise UserError(
            f"transformers cannot load it ({str(error).strip().splitlines()[0][:160]})", str(folder), "check the folder"
        ) from None
    config = module.config.to_dict()
    size = config.get("image_size", 0)
    return Network(model, module, {"config": config}, image_size=size if isinstance(size, int) else 0)


def takes_images(module: nn.Module, x: Tensor, where: str) -> Tensor:
    """Logits of one batch.

    Raises:
        UserError: the network does not take such images, or returns no logits.
    """
    try:
        with torch.no_grad():
            found = logits(module, x)
    except UserError:
        raise
    except Exception as error:  # a network may fail as it likes
        shape = "×".join(map(str, x.shape[1:]))
        raise UserError(
            f"fails on images of {shape}: {str(error).strip().splitlines()[0][:160]}", where, "check --data"
        ) from None
    if found.dim() != 2 or len(found) != len(x):
        raise UserError(f"returns {tuple(found.shape)} for {len(x)} images", where, "return (images, classes)")
    return found


def origin_of(module: nn.Module) -> dict[str, Any]:
    """How a module of the caller's could be built again, as far as it says so itself."""
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict") and inspect.ismethod(config.to_dict):
        return {"config": config.to_dict()}
    return {}
