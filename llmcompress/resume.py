"""What a run keeps beside its output while it lasts, in ``<output>.partial``, so that it goes on after a ``kill -9`` at
any moment and writes the bytes it would have written.

    lock                held by the process that writes here
    run.json            what the result hangs on, and the command: from here on the run can be gone on with
    tokens.safetensors  calibration and evaluation rows
    smaller, recovered  checkpoints of a structured step and of the training after it, with smaller.json, recovered.json
    annealing.json      moves of a search
    model               the folder that gets the final name at the end
    rest.json           shards of what lies outside the blocks
    entering-00004      what block 3 returned to every forward, with which block 4 goes on
    blocks/00003.json   report, schemes, warnings and shards of a block: written last of all that belongs to it

Every file that others rely on is written under another name, forced to disk and renamed. A file system without
``flock`` has no lock."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.core.grid import QuantGrid
from llmcompress.errors import Fault, UserError
from llmcompress.export.checkpoint import REPLACED, Shard
from llmcompress.export.destination import is_full_disk, remove_empty, sync
from llmcompress.export.quantized import Scheme
from llmcompress.hidden_states import StoredValues, save_value
from llmcompress.identity import differences
from llmcompress.lock import Lock
from llmcompress.report import BlockReport

Rows = tuple[Tensor | None, Tensor | None]


@dataclass
class KeptBlock:
    """What is kept of a finished block.

    Attributes:
        report: its figures.
        schemes: of its quantized matrices, by module name.
        warnings: that came up in it.
        shards: that hold it.
        call: hash of what the next block was called with, see `llmcompress.hidden_states.digest`.
        phases, seconds: of the run so far.
    """

    report: BlockReport
    schemes: dict[str, Scheme]
    warnings: list[str]
    call: str
    phases: dict[str, float]
    seconds: float
    shards: list[Shard]


class Workplace:
    """The folder of an unfinished run; used as a context manager, which locks it.

    Left without an error, or by a user's, it is removed; left by a machine's `Fault`, an interruption or a crash it is
    kept if the run can be gone on with, and the error that comes through says so.

    Args:
        output: that the run writes.
        resume: go on with what is there; otherwise an unfinished run is refused.
        force: discard an unfinished run.
    """

    def __init__(self, output: Path, resume: bool = False, force: bool = False) -> None:
        self.output = Path(output).absolute()
        self.folder = folder_of(output)
        self.model = self.folder / "model"
        self._resume, self._force = resume, force
        self._run: dict[str, Any] = {}
        self._made_parents: list[Path] = []

    def __enter__(self) -> Workplace:
        missing = [self.output.parent, *self.output.parent.parents]
        self._made_parents = [folder for folder in missing if not folder.exists()]
        try:
            self._lock = Lock(self.folder)
        except OSError as error:
            raise UserError(_words(error), str(self.folder), "choose another --output") from error
        if self.resumable and not (self._resume or self._force):
            self._lock.release()
            fix = "go on with it by --resume, or discard it by --force"
            raise UserError("an unfinished run is kept there", str(self.folder), fix)
        if not (self.resumable and self._resume):
            self._empty()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = isinstance(error, UserError) and not isinstance(error, Fault) and bool(self._run)
        try:
            if error is None or refused or not self.resumable:
                self._empty()
                shutil.rmtree(self.folder, ignore_errors=True)
                remove_empty(self._made_parents)
        finally:
            self._lock.release()
        if error is not None and (told := self.told(error)) is not None:
            raise told from error

    @property
    def resumable(self) -> bool:
        """Whether there is something to go on with."""
        return (self.folder / "run.json").is_file()

    @property
    def goes_on(self) -> bool:
        """Whether an earlier process began this run."""
        return bool(self._run.get("begun"))

    @property
    def force(self) -> bool:
        """Whether the run may replace an earlier output, as its first command said."""
        return bool(self._run["force"])

    @property
    def command(self) -> str:
        """The run's first command line."""
        return str(self._run["command"])

    @property
    def output_name(self) -> str:
        """The output as the first command named it."""
        return str(self._run["output"])

    def begin(self, identity: Callable[[], dict[str, Any]], command: str, output: str) -> None:
        """Says what the result hangs on, and how it was called for.

        Raises:
            UserError: what is there belongs to another run.
        """
        self._identity = identity
        run = {"command": command, "output": output, "force": self._force}
        if (kept := self.kept("run.json")) is not None:
            if different := differences(kept["identity"], identity()):
                raise UserError(
                    f"is the beginning of another run: {'; '.join(different[:4])}", str(self.folder),
                    "give the options of that run, or discard it by --force without --resume",
                )  # fmt: skip
            run = kept | {"begun": True}
        self._run = run

    def tokens(self, drawn: Rows | None) -> Rows:
        """Calibration and evaluation rows: the kept ones, or those ``drawn`` where none are kept. From here on the run
        can be gone on with."""
        path = self.folder / "tokens.safetensors"
        if drawn is not None:
            named = zip(("rows", "evaluation"), drawn, strict=True)
            save_file({name: rows.clone() for name, rows in named if rows is not None}, path)
            sync(path)
            self.keep("run.json", self._run | {"identity": self._identity()})
        kept = load_file(path)
        return kept.get("rows"), kept.get("evaluation")

    def keep(self, name: str, tree: object) -> None:
        """Writes a JSON file, whole or not at all."""
        path = self.folder / name
        half = path.with_name(f"{path.name}.half")
        path.parent.mkdir(exist_ok=True)
        half.write_text(json.dumps(tree, default=_plain), encoding="utf-8")
        sync(half)
        half.replace(path)
        sync(path.parent)

    def kept(self, name: str) -> Any:
        """What `keep` wrote; None if there is nothing."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finished_blocks(self) -> list[KeptBlock]:
        """In order, from the first block on."""
        found: list[KeptBlock] = []
        while (tree := self.kept(_block_file(len(found)))) is not None:
            report = BlockReport.from_dict(tree["report"])
            schemes = {name: _scheme(scheme) for name, scheme in tree["schemes"].items()}
            shards = [Shard(**shard) for shard in tree["shards"]]
            found.append(KeptBlock(**{**tree, "report": report, "schemes": schemes, "shards": shards}))
        for folder in self.folder.glob("entering-*"):
            if folder != self._entering(len(found)):
                shutil.rmtree(folder)
        return found

    def finished_rest(self) -> list[Shard]:
        """The shards of what lies outside the blocks; none if they are not all written."""
        return [Shard(**shard) for shard in self.kept("rest.json") or ()]

    def keep_rest(self, shards: Sequence[Shard]) -> None:
        """Notes that what lies outside the blocks is on disk."""
        self.keep("rest.json", [asdict(shard) for shard in shards])

    def save_returned(self, index: int, lane: int, number: int, value: object, rank: int = 0) -> None:
        """Writes what the block before block ``index`` returned to a forward of a lane of a process."""
        folder = self._entering(index)
        folder.mkdir(exist_ok=True)
        save_value(folder / f"{rank}-{lane}-{number:05d}.safetensors", value)

    def returned(self, index: int, lanes: int, device: str, rank: int = 0) -> list[Sequence[object]]:
        """What `save_returned` wrote for the forwards of one process."""
        folder = self._entering(index)
        return [
            StoredValues(sorted(folder.glob(f"{rank}-{lane}-*.safetensors")), device) for lane in range(lanes)
        ]  # fmt: skip

    def keep_block(self, index: int, block: KeptBlock) -> None:
        """Notes that a block is finished, once everything that belongs to it is on disk."""
        self.sync_returned(index + 1, "*")
        self.keep(_block_file(index), asdict(block))
        shutil.rmtree(self._entering(index), ignore_errors=True)

    def sync_returned(self, index: int, rank: int | str) -> None:
        """Forces to disk what `save_returned` wrote in one process, or in all ("*"): others may be writing still, and
        what they have not given its name yet is theirs to wait for."""
        folder = self._entering(index)
        for path in (*folder.glob(f"{rank}-*.safetensors"), folder) if folder.is_dir() else ():
            sync(path)

    def _entering(self, index: int) -> Path:
        return self.folder / f"entering-{index:05d}"

    def _empty(self) -> None:
        """Removes everything but the lock, run.json first, and gives a replaced output its name back."""
        replaced = self.folder / REPLACED
        if replaced.is_dir() and not self.output.exists():
            replaced.rename(self.output)
        (self.folder / "run.json").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def told(self, error: BaseException) -> BaseException | None:
        """The error as one line that says whether the run can be gone on with; None if it is fine as it is."""
        resumable = self.resumable
        blocks = len(list((self.folder / "blocks").glob("*.json")))
        kept = f"{blocks} finished block{'s' * (blocks != 1)}" if blocks else "what was begun"
        fix = f"; {kept} kept, the same command with --resume goes on" if resumable else ""
        if isinstance(error, KeyboardInterrupt):
            return KeyboardInterrupt(fix.removeprefix("; ")) if resumable else None
        if is_full_disk(error):
            return Fault("the disk is full", str(self.output), f"free some space{fix or ' or choose another --output'}")
        if isinstance(error, OSError | SafetensorError):
            name = getattr(error, "filename", None) or self.folder
            return Fault(_words(error), str(name), f"mend that{fix}")
        if isinstance(error, Fault):
            return Fault(error.what, error.where, f"{error.fix}{fix}")
        return None


def folder_of(output: Path) -> Path:
    """Where an unfinished run of this output is kept."""
    output = Path(output).absolute()
    return output.with_name(f"{output.name}.partial")


def _block_file(index: int) -> str:
    return f"blocks/{index:05d}.json"


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _scheme(tree: dict[str, Any]) -> Scheme:
    parts: dict[str, Any] = {name: _grid(part) if isinstance(part, dict) else part for name, part in tree.items()}
    return Scheme(**parts)


def _grid(tree: dict[str, Any]) -> QuantGrid:
    """JSON has lists for tuples."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    return QuantGrid(**fields)


def _plain(value: Any) -> Any:
    """Of what JSON does not know: tensors, arrays and their scalars as numbers, the rest in words."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
