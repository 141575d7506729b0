"""The steps of one compression of a convolutional network, in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llmcompress.core.group import Method
from llmcompress.errors import UserError
from llmcompress.measure import Phases, versions
from llmcompress.progress import Progress
from llmcompress.vision.budget import LatencyBudget
from llmcompress.vision.channels import ChannelOptions
from llmcompress.vision.equalise import equalise
from llmcompress.vision.fold import Folded, fold_norms
from llmcompress.vision.held import held
from llmcompress.vision.images import Images
from llmcompress.vision.importance import score_masks
from llmcompress.vision.judge import multiplications
from llmcompress.vision.latency import LatencyTable
from llmcompress.vision.masks import GrowingMasks
from llmcompress.vision.mixed import choose_bits
from llmcompress.vision.network import takes_images
from llmcompress.vision.recipe import VisionRecipe
from llmcompress.vision.removal import remove_channels
from llmcompress.vision.report import VisionReport
from llmcompress.vision.soft import SoftFilters
from llmcompress.vision.tune import reestimate, train
from llmcompress.vision.walk import LayerWalk, input_groups

#: images on which folds and removals are verified
PROBE = 8


@dataclass(frozen=True)
class VisionOptions:
    """Everything about a run but the network and the recipe.

    Attributes:
        data: ``digits``, a folder of classes, or an ``.npz``.
        samples: images to calibrate on.
        batch: images per micro-batch.
        image_size: of a side, to which images of a folder are brought; 0 takes the network's own.
        seed: of everything random.
        evaluate: judge on held-out images.
        recover_epochs: of every training, see `TuneOptions`; 0 takes the recipe's.
        on_misfit: what becomes of layers that a pattern or group does not divide: ``skip`` or ``refuse``.
        export: files for other programs, keys of `llmcompress.vision.exported.FILES`.
        latency_table: a file of latencies measured on this machine, read if it is there and added to; None for none.
    """

    data: str = "digits"
    samples: int = 512
    batch: int = 64
    image_size: int = 0
    seed: int = 0
    evaluate: bool = True
    recover_epochs: int = 0
    on_misfit: str = "skip"
    export: tuple[str, ...] = ()
    latency_table: Path | None = None

    def __post_init__(self) -> None:
        for key in ("samples", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{getattr(self, key)} is not positive", f"--{key}", "use 1 or more")
        if self.on_misfit not in ("skip", "refuse"):
            raise UserError(f"unknown '{self.on_misfit}'", "--on-misfit", "use skip or refuse")
        if self.recover_epochs < 0:
            raise UserError(f"{self.recover_epochs} epochs", "--recover-epochs", "use 0 or more")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative", "--seed", "use 0 or more")
        if self.image_size < 0:
            raise UserError(f"{self.image_size} pixels", "--image-size", "use a positive number")


@dataclass
class Compressed:
    """A compressed network in memory.

    Attributes:
        module: it; runs like any other module.
        report: what it cost; figures of held-out images only where they were given.
        folded: names of norms that are part of convolutions now.
        masks: False where a weight was dropped, by layer name.
    """

    module: nn.Module
    report: VisionReport
    folded: list[str] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)


def compress_vision(
    module: nn.Module,
    batches: Iterable[Tensor],
    recipe: str | Path | VisionRecipe = "int8",
    *,
    overrides: Iterable[str] = (),
    options: VisionOptions | None = None,
    labels: Tensor | None = None,
    train: Images | None = None,
    name: str = "",
    phases: Phases | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a network of Conv2d, Linear and BatchNorm.

    Args:
        module: any ``nn.Module`` from (N, C, H, W) to logits; it stays as it is.
        batches: calibration images (n, C, H, W) float32.
        recipe: name, YAML file or recipe.
        overrides: ``stage.key=value`` changes of it.
        options: seed, and what becomes of layers that do not fit; its ``data`` is not read.
        labels: (N,) int64 of all calibration images, for scores from gradients.
        train: images that recovery learns from; those of the calibration if None.
        name: for the report.
        phases, progress: told of where the time goes.

    Raises:
        UserError: bad input; the module is unchanged.
    """
    found = list(batches)
    if not found or any(x.dim() != 4 or not x.is_floating_point() for x in found):
        raise UserError("batches are no (n, C, H, W) float tensors", "batches", "give calibration images")
    recipe = recipe if isinstance(recipe, VisionRecipe) else VisionRecipe.load(recipe, overrides)
    images = Images(torch.cat(found).float(), labels)
    steps = _Steps(
        module, images, recipe, options or VisionOptions(), phases or Phases(), progress or Progress(silent=True)
    )
    steps.train = train
    steps.report.model = name or type(module).__name__
    return steps.run()


class _Steps:
    """The steps of one compression."""

    def __init__(
        self,
        module: nn.Module,
        images: Images,
        recipe: VisionRecipe,
        options: VisionOptions,
        phases: Phases,
        progress: Progress,
    ) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.images, self.recipe, self.options = images, recipe, options
        self.phases, self.progress = phases, progress
        self.probe = images.pixels[:PROBE]
        self.train: Images | None = None
        self.tune = recipe.training(options.recover_epochs)
        self.dense = copy.deepcopy(self.module) if self.tune else self.module
        self.report = VisionReport("", recipe.name, options.seed, versions())

    def run(self) -> Compressed:
        takes_images(self.module, self.probe, "--data")
        macs = multiplications(self.module, self.probe)
        parameters = sum(p.numel() for p in self.module.parameters())
        self._remove_channels()
        grown = self._grow_masks()
        folded = self._fold()
        self._equalise()
        result = self._walk(grown or self._masks())
        self._train_held(result)
        if self.recipe.batchnorm == "reestimate":
            with self.phases("reestimate"):
                reestimate(self.module, self.images)
        self.report.macs = {"before": macs, "after": multiplications(self.module, self.probe)}
        self.report.parameters = {"before": parameters, "after": sum(p.numel() for p in self.module.parameters())}
        return Compressed(self.module, self.report, [norm for _, norm in folded.pairs], result)

    def _fold(self) -> Folded:
        if self.recipe.batchnorm != "fold":
            return Folded()
        with self.phases("fold"):
            folded = fold_norms(self.module, self.probe)
        self.report.fold = {"pairs": len(folded.pairs), "refused": folded.refused, "error": folded.error}
        return folded

    def _equalise(self) -> None:
        if not self.recipe.equalise:
            return
        with self.phases("equalise"):
            found = equalise(self.module, self.probe, self.options.seed)
        self.report.equalised = {"pairs": found.pairs, "refused": found.refused, "error": found.error}
        if found.refused:
            told = f"{len(found.refused)} pairs of layers keep their ranges, as no factor passes between them"
            self.report.warnings.append(f"{told} ({found.refused[0]}, …)")

    def _remove_channels(self) -> None:
        o, wanted = self.options, self.recipe.channels
        if wanted is None:
            return
        self._soften(wanted)
        dense = self.module
        self.module = copy.deepcopy(dense)
        with self.phases("channels"):
            budget = None
            if wanted.budget == "latency":
                folds = self.recipe.batchnorm == "fold"
                budget = LatencyBudget(dense, wanted, self.images.pixels, LatencyTable(o.latency_table), folds)
            gone = remove_channels(self.module, wanted, self.images, self.probe, self.recipe.targets, o.seed, budget)
        self.report.channels, self.report.removal_error = gone.channels, gone.error
        self.report.latency = gone.latency
        self.report.warnings += gone.warnings
        if self.tune is not None:
            self._train("after channels went")
        else:
            with self.phases("reestimate"):
                reestimate(self.module, self.images)

    def _train(
        self, what: str, renew: bool = True, at: Callable[[float], None] | None = None,
        each_epoch: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """One training, and its line of the report; the arguments are those of `train`."""
        assert self.tune is not None
        images = self.images if self.train is None else self.train
        with self.phases("train"), self.progress.phase("training", self.tune.epochs, "epoch") as advance:

            def epoch() -> None:
                each_epoch()
                advance(1)

            found = train(
                self.module, self.dense, images, self.tune, self.options.seed, renew=renew, at=at, each_epoch=epoch
            )
        self.report.trainings.append({"what": what} | found)

    def _soften(self, wanted: ChannelOptions) -> None:
        if self.tune is not None and self.tune.soft:
            filters = SoftFilters(self.module, wanted, self.recipe.targets, self.images.pixels[:2])
            self._train("while filters were zeroed", each_epoch=filters)

    def _grow_masks(self) -> dict[str, Tensor]:
        """Masks that a schedule leads to; none without one."""
        wanted = self.recipe.scores
        if wanted is None or wanted.schedule == "once":
            return {}
        masks = GrowingMasks(self.module, self._names(), wanted, self.images)
        self._train("while masks grew", at=masks)
        self.report.trainings[-1]["sparsity"] = masks.ratios
        return masks.masks

    def _train_held(self, masks: dict[str, Tensor]) -> None:
        """Trains what the walk left, with its masks and grids; figures of the layers are then of what came out."""
        if self.tune is None or not self.report.matrices:
            return
        with held(self.module, masks):
            self._train("with masks and grids held", renew=False)
        for matrix in self.report.matrices:
            name, _, part = matrix.name.partition("[")
            weight = self.module.get_parameter(f"{name}.weight")
            rows = weight if not part else weight[int(part.rstrip("]")) * matrix.shape[0] :][: matrix.shape[0]]
            matrix.sparsity = float((rows == 0).float().mean())

    def _names(self) -> list[str]:
        """Of the layers that are called and targeted, in the network's order."""
        called = {m.name for g in input_groups(self.module, self.images.pixels[:1]) for m in g.matrices}
        return [n for n, _ in self.module.named_modules() if n in called and self.recipe.targets(n)]

    def _masks(self) -> dict[str, Tensor]:
        wanted = self.recipe.scores
        if wanted is None:
            return {}
        with self.phases("scores"):
            names = self._names()
            masks = score_masks(self.module, names, wanted.sparsity, wanted.score, wanted.scope, self.images)
        self.report.warnings += [
            f"{n}: left dense, {wanted.sparsity} does not divide it" for n in names if n not in masks
        ]
        return masks

    def _bits(self) -> dict[str, tuple[Method, ...]]:
        """The steps of layers whose numbers of bits are their own."""
        wanted = self.recipe.mixed
        if wanted is None:
            return {}
        with self.phases("bits"):
            steps, called = self.recipe.methods, input_groups(self.module, self.images.pixels[:1])
            groups = [
                names for group in called
                if (names := [m.name for m in group.matrices if self.recipe.targets(m.name)])
                and not any(step.misfit(group.width) for step in steps)
            ]  # fmt: skip
            found = choose_bits(self.module, groups, steps, wanted, self.images.pixels, self.options.seed)
        self.report.mixed = found.told
        return found.methods

    def _walk(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.recipe.methods and not masks:
            return {}
        batches = self.images.batches(self.options.batch)
        walk = LayerWalk(
            self.module, batches, self.recipe, methods=self._bits(), masks=masks,
            refuse=self.options.on_misfit == "refuse",
        )  # fmt: skip
        with self.phases("compress"), self.progress.phase("compressing", unit="layer") as advance:
            for _ in walk.run():
                advance(1)
        self.report.matrices = walk.result.matrices
        self.report.warnings += walk.result.warnings
        return walk.result.masks
