"""Where a run starts: the dense model, opened, and the rows of tokens it is calibrated and judged on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llmcompress.arithmetic import choose_device, choose_dtype
from llmcompress.calibration import NONE, SELF, evaluation_rows, token_rows
from llmcompress.errors import UserError
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.locate import locate
from llmcompress.options import Options
from llmcompress.progress import Progress
from llmcompress.sampling import self_samples

#: sequences of the model's own samples on which the result is judged if no text is given, and their seed's offset
HELD_OUT_SAMPLES = 16
HELD_OUT_SEED = 1_000_003


class Source:
    """The dense model a run starts from: found, opened, and the device and dtype it will be computed in."""

    def __init__(self, model: str | Path, options: Options) -> None:
        self.name, self.options = str(model), options
        self.folder = locate(self.name)
        self.checkpoint = Checkpoint(self.folder)
        if self.checkpoint.config.get("quantization_config"):
            raise UserError("is quantized already", str(self.folder), "give the dense checkpoint")
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.checkpoint, self.device)

    def open(self, checkpoint: Checkpoint | None = None) -> BlockwiseModel:
        """The model, or one saved from it, its blocks on disk."""
        code = self.options.trust_remote_code
        return BlockwiseModel(checkpoint or self.checkpoint, self.dtype, self.device, code)


def draw_tokens(source: Source, samples: int, progress: Progress) -> tuple[Tensor | None, Tensor | None]:
    """(N, T) calibration rows and evaluation rows; None where not wanted.

    Args:
        samples: how many of the calibration rows will be used; what the model writes itself is no longer than that.

    Texts are read first, as they may be too short; what the model has to write itself is written in one go.
    """
    o = source.options
    if samples < o.rows:
        progress.say(f"{samples} of {o.rows} calibration rows are read: no step needs more")
    rows = eval_rows = None
    wanted: list[tuple[int, int, int]] = []
    if samples and o.calibration == SELF:
        wanted.append((samples, o.length, o.seed))
    elif samples or o.calibration == NONE:
        rows = token_rows(o.calibration_rows, source.folder, trust_remote_code=o.trust_remote_code)
    if o.evaluate and o.eval_text is None:
        wanted.append((HELD_OUT_SAMPLES, o.length, o.seed + HELD_OUT_SEED))
    elif o.evaluate:
        eval_rows = evaluation_rows(str(o.eval_text), source.folder, o.length, trust_remote_code=o.trust_remote_code)
    if wanted:
        total = sum(count * length for count, length, _ in wanted)
        with progress.phase("sampling the model", total, "token") as advance:
            drawn = self_samples(
                source.folder, wanted,
                device=source.device, dtype=source.dtype, trust_remote_code=o.trust_remote_code, advance=advance,
            )  # fmt: skip
        if samples and rows is None:
            rows = drawn.pop(0)
        if o.evaluate and eval_rows is None:
            eval_rows = drawn.pop(0)
    return rows, eval_rows
