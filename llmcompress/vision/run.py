"""One run on a convolutional network, from what the user gave to a published folder."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmcompress.errors import Fault, UserError
from llmcompress.export.checkpoint import CheckpointWriter
from llmcompress.export.destination import DESCRIPTION, RECORD, check_disk_space, check_output, sha256
from llmcompress.measure import Phases, peak_memory_bytes
from llmcompress.progress import Progress
from llmcompress.vision.channels import spaces
from llmcompress.vision.exported import check_exports, export
from llmcompress.vision.fold import Folded, fold_norms
from llmcompress.vision.graph import channel_graph
from llmcompress.vision.images import ImageSet, read_images
from llmcompress.vision.judge import accuracy, all_logits
from llmcompress.vision.network import Network, open_network, origin_of, takes_images
from llmcompress.vision.recipe import VisionRecipe
from llmcompress.vision.report import VisionReport
from llmcompress.vision.steps import PROBE, VisionOptions, compress_vision
from llmcompress.vision.storage import stored_network
from llmcompress.vision.walk import input_groups

#: all tensors in one file
WHOLE = sys.maxsize


class VisionRun:
    """A run of the command: opened, checked, and then executed.

    Args:
        model: ``resnet``, ``mobilenet``, a folder, or ``module:function``.
        recipe: name, file or recipe.
        output: folder to write; default ``compressed/<model>-<recipe>``.
        options: data, samples, seed.
        overrides: of the recipe.
        force: replace an output of this program.

    Raises:
        UserError: bad input, before any work.
    """

    def __init__(
        self, model: str, recipe: str | Path | VisionRecipe = "int8", output: str | Path | None = None,
        options: VisionOptions | None = None, *, overrides: Sequence[str] = (), force: bool = False,
    ) -> None:  # fmt: skip
        self.recipe = recipe if isinstance(recipe, VisionRecipe) else VisionRecipe.load(recipe, overrides)
        self.options, self.force = options or VisionOptions(), force
        short = Path(model).resolve().name if Path(model).exists() else model.replace(":", "-")
        self.output = Path("compressed") / f"{short}-{self.recipe.name}" if output is None else Path(output)
        check_output(self.output, force)
        if self.options.latency_table is None:
            self.options = replace(self.options, latency_table=self.output.parent / "latency.json")
        self.network: Network = open_network(model)
        o, folder = self.options, self.network.folder
        check_output(self.output, force, folder)
        normal = folder / "preprocessor_config.json" if folder else None
        size = o.image_size or self.network.image_size
        self.data: ImageSet = read_images(o.data, o.samples, o.seed, size, normal, self.network.grey)
        self.images = self.data.calibration(o.samples, o.seed)
        found = takes_images(self.network.module, self.images.pixels[:PROBE], model)
        labels = self.data.test.labels
        if labels is not None and int(labels.max()) >= found.shape[1]:
            raise UserError(f"has {found.shape[1]} classes and the data {int(labels.max()) + 1}", model, "check --data")
        check_exports(o.export, self.network.module, self.images.pixels[:PROBE])

    def plan(self) -> dict[str, Any]:
        """What would be done: layers in order of execution, their shapes, and what does not fit. Writes nothing."""
        module = copy.deepcopy(self.network.module)
        folded = fold_norms(module, self.images.pixels[:PROBE]) if self.recipe.batchnorm == "fold" else Folded()
        layers = [
            {"name": m.label, "shape": list(m.shape), "groups": m.groups, "targeted": self.recipe.targets(m.name)}
            for group in input_groups(module, self.images.pixels[:1]) for m in group.matrices
        ]  # fmt: skip
        return {
            "spaces": self._planned_spaces(),
            "model": self.network.name, "recipe": self.recipe.tree, "output": str(self.output),
            "images": {"calibration": len(self.images), "held out": len(self.data.test)},
            "layers": layers, "norms folded": len(folded.pairs), "norms kept": folded.refused,
        }  # fmt: skip

    def _planned_spaces(self) -> list[dict[str, Any]]:
        """Channels that go together; how many of them stay, where that is known without measuring anything."""
        wanted, dense = self.recipe.channels, self.network.module
        if wanted is None:
            return []
        found = []
        for space in spaces(dense, channel_graph(dense, self.images.pixels[:2])):
            stays: int | str = f"by {wanted.budget}"
            if not all(map(self.recipe.targets, space.layers)):
                stays = space.channels
            elif wanted.budget == "channels":
                stays = space.kept(1 - wanted.ratio, wanted.multiple) * space.width
            found.append({
                "name": space.name, "channels": space.channels, "together": space.width, "kept": stays,
                "weights": space.weights, "layers": list(space.layers),
            })  # fmt: skip
        return found

    def execute(self, progress: Progress | None = None, command: str = "") -> VisionReport:
        """Compresses, judges and publishes."""
        progress, phases, o = progress or Progress(silent=True), Phases(), self.options
        dense = self.network.module
        needed = 2 * sum(p.numel() * 4 for p in dense.parameters())
        check_disk_space(self.output, needed)
        found = compress_vision(
            dense, self.images.batches(o.batch), self.recipe, options=o, labels=self.images.labels,
            train=self.data.train, name=self.network.name, phases=phases, progress=progress,
        )  # fmt: skip
        report = found.report
        report.data = {"source": o.data, "calibration": len(self.images), "held out": len(self.data.test)}
        if o.evaluate:
            with phases("evaluate"):
                self._judge(found.module, report)
        tensors, description = stored_network(
            found.module, self.network.origin or origin_of(dense), found.folded, dense
        )
        files = {DESCRIPTION: description, "recipe.yaml": self.recipe.to_yaml()}
        try:
            self._write(found.module, tensors, files, report, phases, command)
        except OSError as error:
            raise Fault(f"cannot be written ({error.strerror})", str(self.output), "choose another --output") from None
        return report

    def _write(
        self, module: nn.Module, tensors: dict[str, Tensor], files: dict[str, str], report: VisionReport,
        phases: Phases, command: str,
    ) -> None:  # fmt: skip
        """The folder, which takes its name when it is complete."""
        dense = self.network.module
        with CheckpointWriter(self.output, self.force, self.network.folder, shard_bytes=WHOLE) as writer:
            with phases("write"):
                writer.add(tensors)
                hashes = writer.hashes
                before = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
                report.size_bytes = {"before": before, "after": writer.total_bytes}
            for kind in self.options.export:
                with phases("export"):
                    try:
                        made = export(kind, module, self.images.pixels[:PROBE], writer.partial)
                    except UserError as error:
                        report.warnings.append(str(error))
                        continue
                report.exports.append(made)
                hashes[made["file"]] = sha256(writer.partial / made["file"])
            with phases("write"):
                writer.seal(files | {RECORD: self._record(report, command, hashes)})
            with phases("page"):
                from llmcompress.pages.vision_page import vision_page  # plots are not loaded before
            report.seconds_by_phase, report.seconds = phases.seconds, phases.total
            report.peak_memory_bytes, report.output = peak_memory_bytes(), str(self.output)
            page = vision_page(report, files["recipe.yaml"], command)
            writer.publish({"report.json": report.to_json() + "\n", "report.html": page})

    def _judge(self, module: nn.Module, report: VisionReport) -> None:
        test = self.data.test
        before, after = all_logits(self.network.module, test), all_logits(module, test)
        report.accuracy = {"before": accuracy(before, test.labels), "after": accuracy(after, test.labels)}
        report.agreement = float((before.argmax(1) == after.argmax(1)).float().mean())
        report.logit_error = float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))

    def _record(self, report: VisionReport, command: str, hashes: dict[str, str]) -> str:
        """What the folder says about itself."""
        record = {
            "kind": "vision", "model": report.model, "recipe": {"name": self.recipe.name, "hash": self.recipe.hash},
            "command": command, "seed": report.seed, "versions": report.versions, "sha256": hashes,
        }  # fmt: skip
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
