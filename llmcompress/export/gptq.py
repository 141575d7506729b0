"""GPTQ's layout (``quant_method: gptq``), which AutoGPTQ began and gptqmodel, transformers, vLLM and SGLang read: for
servers that do not take compressed-tensors. Codes and scales go from one layout to the other; nothing is rounded again,
except that scales are stored in float16, as all writers of this layout do.

Codes are unsigned, q = code + 2^(b−1), and a word of 32 bits holds them from its lowest bit on, a code of 3 bits
running over into the next word:

| tensor of a Linear [O, I] | shape            |                                                                 |
|---------------------------|------------------|-----------------------------------------------------------------|
| ``qweight`` int32         | (I·b/32, O)      | packed along the input                                          |
| ``qzeros`` int32          | (I/group, O·b/32)| zero points, packed along the output                            |
| ``scales`` float16        | (I/group, O)     | w = scale · (q − zero)                                          |
| ``g_idx`` int32           | (I,)             | the group of each column, here always column // group           |

Two conventions of one layout, told apart by ``checkpoint_format``: ``gptq`` stores each zero point less one, and its
readers add one, so that a zero point of 0 has no place; ``gptq_v2`` stores it as it is, and fewer programs read it.
Symmetric weights have the zero point 2^(b−1): both conventions hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from torch import Tensor

from llmcompress.core.grid import QuantGrid, QuantizedWeight
from llmcompress.errors import UserError

#: convention by the name of ``pack --to``
KINDS = {"gptq": "gptq", "gptq-v2": "gptq_v2"}
#: less of a zero point that is stored
_STORED_LESS = {"gptq": 1, "gptq_v2": 0}
#: widths that the layout's readers know
BITS = (2, 3, 4, 8)
#: endings of the tensors of a matrix
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32


def is_layout(config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` says that it is in this layout."""
    return (config.get("quantization_config") or {}).get("quant_method") == "gptq"


def why_not(grid: QuantGrid, rows: int, columns: int) -> str:
    """Why weights (rows, columns) on this grid do not fit the layout; empty if they do."""
    if grid.kind != "int" or grid.bits not in BITS:
        return f"{grid} is no grid of 2, 3, 4 or 8-bit integers"
    if rows % _WORD or columns % _WORD:
        return f"{rows} × {columns} are not multiples of {_WORD}"
    if columns % grid.group_size(columns):
        return f"groups of {grid.group} do not divide its {columns} columns"
    return ""


def pack(quantized: QuantizedWeight, checkpoint_format: str) -> dict[str, Tensor]:
    """The tensors of one Linear by their name within it.

    Args:
        quantized: codes (out, in) for which `why_not` is silent, and levels.
        checkpoint_format: ``gptq`` or ``gptq_v2``.

    Raises:
        ValueError: a zero point or a scale that cannot be stored.
    """
    grid, codes, half = quantized.grid, quantized.codes, 1 << quantized.grid.bits - 1
    rows, columns = codes.shape
    size = grid.group_size(columns)
    scale = quantized.levels.scale.expand(rows, columns // size)
    zero = quantized.levels.zero_point
    zeros = (torch.zeros_like(scale) if zero is None else zero.expand_as(scale)) + half
    stored = zeros - _STORED_LESS[checkpoint_format]
    if stored.min() < 0:
        raise ValueError("a zero point of 0 has no place in it")
    scales = scale.to(torch.float16)
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError("a scale is outside the range of float16")
    return {
        "qweight": _to_words(codes.T.to(torch.int16) + half, grid.bits),
        "qzeros": _to_words(stored.to(torch.int16), grid.bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same matrix as compressed-tensors' ``int-quantized`` stores it: ``weight``, ``weight_scale`` and, where the
    config does not say that zero points are the symmetric ones, ``weight_zero_point``.

    Args:
        tensors: of one Linear, by their name within it.
        config: the folder's ``quantization_config``.

    Raises:
        UserError: columns are not in the order of their groups (``desc_act``).
    """
    bits, half = int(config["bits"]), 1 << int(config["bits"]) - 1
    codes = (_from_words(tensors["qweight"], bits) - half).T.to(torch.int8).contiguous()
    groups, columns = len(tensors["scales"]), codes.shape[1]
    size = columns // groups
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), torch.arange(columns) // size):
        raise UserError("its columns are in the order of their activations (desc_act)", "quantization_config",
                        "give a folder that was made with desc_act false")  # fmt: skip
    found = {"weight": codes, "weight_scale": tensors["scales"].T.contiguous()}
    if not _symmetric(config):
        stored = _from_words(tensors["qzeros"].T, bits).T
        zeros = (stored + _STORED_LESS[_format(config)]) % (1 << bits) - half  # a stored −1 has wrapped around
        found["weight_zero_point"] = zeros.T.to(torch.int8).contiguous()
    return found


def configuration(grid: QuantGrid, checkpoint_format: str, program: str) -> dict[str, Any]:
    """``config.json["quantization_config"]``, which is also the content of ``quantize_config.json``.

    Args:
        grid: of every quantized matrix.
        checkpoint_format: ``gptq`` or ``gptq_v2``.
        program: what wrote the folder, with its version.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "bits": grid.bits,
        "group_size": grid.group if isinstance(grid.group, int) else -1,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [program]},
    }


def library_scheme(config: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme of every quantized matrix, in compressed-tensors' words.

    Raises:
        UserError: it is not understood.
    """
    try:
        bits, size, known = int(config["bits"]), int(config["group_size"]), _format(config) in _STORED_LESS
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"unreadable ({error})", "quantization_config") from error
    if bits not in BITS or not known:
        raise UserError(f"GPTQ's layout {_format(config)} of {bits} bits is not read", "quantization_config")
    strategy = QuantizationStrategy.GROUP if size > 0 else QuantizationStrategy.CHANNEL
    weights = QuantizationArgs(
        num_bits=bits, symmetric=_symmetric(config), strategy=strategy, group_size=size if size > 0 else None
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format=CompressionFormat.int_quantized)


def _symmetric(config: Mapping[str, Any]) -> bool:
    return bool(config.get("sym", True))


def _format(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """(n, m) codes in [0, 2^bits), n a multiple of 32 → (n·bits/32, m) int32, packed along the first axis."""
    parts = codes.reshape(-1, _WORD, codes.shape[1])
    words = torch.zeros(len(parts), bits, codes.shape[1], dtype=torch.int64)
    for j in range(_WORD):
        word, shift = divmod(j * bits, _WORD)
        value = parts[:, j].long()
        words[:, word] |= value << shift & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[:, word + 1] |= value >> _WORD - shift
    return words.flatten(0, 1).to(torch.int32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse: (n·bits/32, m) int32 → (n, m) int16."""
    parts = words.reshape(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(parts), _WORD, words.shape[1], dtype=torch.int16)
    for j in range(_WORD):
        word, shift = divmod(j * bits, _WORD)
        value = parts[:, word] >> shift
        if shift + bits > _WORD:
            value = value | parts[:, word + 1] << _WORD - shift
        codes[:, j] = value & (1 << bits) - 1
    return codes.flatten(0, 1)
