"""From what the user typed to a local folder: a preset, a folder, or a model id of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from llmcompress.errors import UserError, nearest
from llmcompress.export.destination import refuse_network, refuse_packed
from llmcompress.resources import model_presets

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "*.py"]


def short_name(model: str) -> str:
    """A name for the output folder: the preset, or the last part of a path or id."""
    if model in model_presets():
        return model
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]


def locate(model: str, option: str = "--model") -> Path:
    """The local folder of a model; Hub models are downloaded (safetensors only, never pickles).

    Args:
        model: what the user typed.
        option: where, for the error.

    Raises:
        UserError: neither preset nor folder nor Hub id, a network of images, or the Hub cannot be reached.
    """
    table = model_presets()
    target = table[model].location if model in table else model
    if Path(target).is_dir():
        refuse_network(Path(target))
        refuse_packed(Path(target))
        return Path(target)
    if not re.fullmatch(r"[\w][\w.-]*/[\w.-]+", target):
        raise UserError(
            "neither a preset, a folder nor a Hub id (owner/name)", f"{option} {model}", nearest(model, table)
        )
    return _download(target)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED))
    except GatedRepoError:
        raise UserError(
            "access to this model is restricted", hub_id, "accept its licence on the Hub and log in"
        ) from None
    except RepositoryNotFoundError:
        raise UserError("no such model on the Hub", hub_id, "check the spelling, or give a folder") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot be fetched from the Hub ({type(error).__name__})", hub_id,
            "connect to the network, or give a local folder or the preset 'llama'",
        ) from error  # fmt: skip
