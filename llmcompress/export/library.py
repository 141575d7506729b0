"""The quantization scheme of each Linear, as the compressed-tensors library describes it: of any format it knows, and
of GPTQ's layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name

from llmcompress.errors import UserError
from llmcompress.export import gptq

_WHERE = "quantization_config"


def library_schemes(config: Mapping[str, Any], linear_names: Iterable[str]) -> dict[str, QuantizationScheme]:
    """The library's scheme of each quantized Linear by name, its ``format`` filled in.

    Args:
        config: ``config.json["quantization_config"]``.
        linear_names: of every Linear; where the layout is GPTQ's, whose config does not name the quantized ones, of
            those that have a ``qweight``.

    Raises:
        UserError: neither a compressed-tensors checkpoint nor one in GPTQ's layout.
    """
    if config.get("quant_method") == "gptq":
        scheme = gptq.library_scheme(config)
        return dict.fromkeys(linear_names, scheme)
    if config.get("quant_method") != "compressed-tensors":
        raise UserError(
            f"quantized by {config.get('quant_method')}",
            _WHERE,
            "use a checkpoint of compressed-tensors or in GPTQ's layout",
        )
    try:
        parsed = QuantizationConfig.model_validate(dict(config))
        groups = [
            group.model_copy(update={"format": CompressionFormat(group.format or parsed.format)})
            for group in parsed.config_groups.values()
            if isinstance(group, QuantizationScheme)
        ]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"unreadable ({str(error).splitlines()[0][:200]})", _WHERE) from error
    targets = sorted({t: g for g in groups for t in g.targets}.items(), key=lambda item: _precedence(item[0]))
    schemes = {}
    for name in linear_names:
        if any(ignored == "Linear" or match_name(name, ignored) for ignored in parsed.ignore or ()):
            continue
        group = next((g for target, g in targets if target == "Linear" or match_name(name, target)), None)
        if group is not None and group.weights is not None:
            schemes[name] = group
    return schemes


def _precedence(target: str) -> tuple[int, str]:
    """The library's order: exact names, then patterns, then class names."""
    return (2 if target == "Linear" else "re:" in target), target
