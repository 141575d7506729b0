"""Everything about a run but the model and the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.calibration import NONE, Calibration
from llmcompress.errors import UserError, nearest
from llmcompress.recover import KINDS


@dataclass(frozen=True)
class Options:
    """Everything about a run but the model and the recipe.

    Attributes:
        calibration: ``self``, a text or JSONL file, a safetensors file of token rows, ``DATASET[:split]``, or ``none``
            for recipes whose steps read no rows.
        samples, length: calibration rows and tokens per row.
        eval_text: file on which the result is judged; None takes held-out samples of the model itself.
        evaluate: False leaves perplexity and divergence out.
        seed: of everything random.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the arithmetic: ``auto``, ``float32`` or ``bfloat16``. Weights are stored in the checkpoint's dtype.
        recover_steps: of training after a structured step, to make up for what it removed; 0 for none.
        recover: ``full`` trains all weights of the blocks, ``lora`` low-rank additions to them, merged at the end.
        low_memory: replay blocks instead of suspending them.
        offload_activations: keep what travels between blocks on disk, and replay blocks.
        on_misfit: what becomes of matrices that a pattern or group does not divide: ``refuse`` the run, or ``skip``
            them, which leaves them dense.
        trust_remote_code: run code that came with the checkpoint.
    """

    calibration: str = "self"
    samples: int = 32
    length: int = 512
    eval_text: str | None = None
    evaluate: bool = True
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    recover_steps: int = 0
    recover: str = "full"
    low_memory: bool = False
    offload_activations: bool = False
    on_misfit: str = "refuse"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        known_values = {
            "device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"), "recover": KINDS,
            "on_misfit": ("refuse", "skip"),
        }  # fmt: skip
        for key, known in known_values.items():
            if getattr(self, key) not in known:
                option = f"--{key.replace('_', '-')}"
                raise UserError(f"unknown '{getattr(self, key)}'", option, nearest(getattr(self, key), known))
        if self.recover_steps < 0:
            raise UserError(f"{self.recover_steps} steps", "--recover-steps", "use 0 or more")
        Calibration(self.calibration, self.samples, self.length, self.seed)  # refuses what makes no rows

    @property
    def calibration_rows(self) -> Calibration:
        """Which rows to calibrate on."""
        return Calibration(self.calibration, self.samples, self.length, self.seed)

    @property
    def rows(self) -> int:
        """How many calibration rows there are."""
        return 0 if self.calibration == NONE else self.samples

    @property
    def replay(self) -> bool:
        """Whether blocks are replayed."""
        return self.low_memory or self.offload_activations
