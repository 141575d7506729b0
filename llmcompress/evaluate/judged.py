"""A model under evaluation: its logits over batches of tokens, or the whole of it for lm-eval.

By default it is *simulated*: weights as they are stored, inputs of quantized matrices rounded as they will be at run
time, products in floating point, block by block from disk. With a runtime it is what `llmcompress.load` makes of the
folder, whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from llmcompress.arithmetic import choose_device, choose_dtype
from llmcompress.errors import UserError, nearest
from llmcompress.evaluate.stream import rounded_activations, streamed_logits
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.model.load import BlockwiseModel
from llmcompress.model.locate import locate
from llmcompress.runtime.loading import RUNTIMES, load

SIMULATED = "simulated"
#: bytes of hidden states that a streamed model may keep between its blocks; more tokens read the blocks again
_LIVE_BYTES = 1 << 30


class Judged:
    """A model's folder, opened, and how it is to be computed.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        config: of transformers.
        tokenizer: of the folder.
        device, dtype: of the arithmetic.

    Raises:
        UserError: no such model, damaged files, no tokenizer, an unknown runtime.
    """

    def __init__(
        self,
        name: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        runtime: str = SIMULATED,
        trust_remote_code: bool = False,
    ) -> None:
        known = (SIMULATED, *RUNTIMES)
        if runtime not in known:
            raise UserError(f"unknown '{runtime}'", "--runtime", nearest(runtime, known))
        if runtime != SIMULATED and trust_remote_code:
            raise UserError(
                "does not run code of a checkpoint", f"--runtime {runtime}", "leave out one of the two options"
            )
        self.name, self.runtime = str(name), runtime
        self.folder = locate(self.name)
        self.checkpoint = Checkpoint(self.folder)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.checkpoint, self.device)
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        self.tokenizer = _tokenizer(self.folder, trust_remote_code)
        self._model = BlockwiseModel(self.checkpoint, self.dtype, self.device, trust_remote_code)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """The longest input the model takes; None if it does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def steps(self) -> int:
        """Times that `logits` tells of progress for each batch."""
        return len(self._model.blocks) if self.runtime == SIMULATED else 1

    def logits(
        self, batches: Sequence[Tensor], advance: Callable[[int], None] = lambda steps: None
    ) -> Iterator[Tensor]:
        """Logits (B, T, V) of every (B, T) batch of token ids in turn."""
        if self.runtime == SIMULATED:
            for chunk in self._chunks(batches):
                yield from streamed_logits(self._model, chunk, advance)
            return
        with self.whole() as model:
            for batch in batches:
                with torch.no_grad():
                    output = model(input_ids=batch.to(self.device), use_cache=False).logits
                advance(1)
                yield output

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all of its weights in memory, computing as `logits` does."""
        if self.runtime != SIMULATED:
            yield load(self.folder, dtype=self.dtype, device=self.device, runtime=self.runtime)
            return
        model = self._model
        model.load_rest(head=True)
        for index in range(len(model.blocks)):
            model.load_block(index)
        with rounded_activations(model):
            yield model.model
        for index in range(len(model.blocks)):
            model.release_block(index)

    def _chunks(self, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        limit = _LIVE_BYTES // (self.config.get_text_config().hidden_size * self.dtype.itemsize)
        chunk: list[Tensor] = []
        for batch in batches:
            if chunk and sum(b.numel() for b in chunk) + batch.numel() > limit:
                yield chunk
                chunk = []
            chunk.append(batch)
        if chunk:
            yield chunk


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"its tokenizer cannot be read ({(str(error).strip().splitlines() or ['no reason given'])[0][:120]})",
            str(folder), "copy the tokenizer files beside the weights",
        ) from error  # fmt: skip
