"""The output folder: safetensors shards written one decoder block at a time, under the final name only when complete.

Everything is written into another folder beside the final name, on the same file system, so that one rename publishes
it. Until then, and after any failure, nothing exists under the final name (or, with ``force``, the old folder does).

One shard at a time is written in the background, while the next block is compressed: disks are slow. A shard counts as
finished once it is forced to disk; a writer can begin with the finished shards of one that was killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import UserError
from llmcompress.export.companions import COMPANIONS, companions
from llmcompress.export.destination import (
    check_output,
    is_full_disk,
    put_in_place,
    remove_abandoned,
    remove_empty,
    sha256,
    sync,
)
from llmcompress.measure import release_freed_memory

#: a larger ``add`` is split: the size hubs and loaders are used to
SHARD_BYTES = 5_000_000_000
#: beside a ``folder`` that somebody else keeps: the old output, between its replacement and its removal
REPLACED = "replaced"


@dataclass(frozen=True)
class Shard:
    """One finished file.

    Attributes:
        names: of its tensors.
        sha256: of the file.
        nbytes: of its tensors.
    """

    names: list[str]
    sha256: str
    nbytes: int


class CheckpointWriter:
    """Writes one checkpoint folder; use as a context manager and call ``finish`` (or ``seal``, ``publish``) last.

    Leaving the context before, or by an exception, removes everything that was written; a disk that filled up leaves it
    as a `UserError`. What a killed process left behind is removed when the next one enters. A ``folder`` that somebody
    else keeps is not removed, and its errors come through as they are.

    Args:
        output: final name of the folder.
        force: replace an earlier output of this program.
        source: folder of the input model, which is never replaced.
        shard_bytes: split a call of ``add`` above this many bytes of tensors.
        folder: where to write until it is published, on the file system of ``output``; None for a hidden one.
        finished: shards in ``folder`` that count as added; whatever else is there is removed.
    """

    def __init__(
        self,
        output: Path,
        force: bool = False,
        source: Path | None = None,
        shard_bytes: int = SHARD_BYTES,
        folder: Path | None = None,
        finished: Sequence[Shard] = (),
    ) -> None:
        self.output, self.force, self.source, self.shard_bytes = Path(output).absolute(), force, source, shard_bytes
        self.partial = folder or self.output.parent / f".{self.output.name}.partial-{os.getpid()}"
        self.shards = list(finished)
        self.total_bytes = sum(shard.nbytes for shard in finished)  # of all tensors so far
        self._kept = folder is not None
        self._shards = [shard.names for shard in finished]  # tensor names of each shard
        self._background = ThreadPoolExecutor(max_workers=1)
        self._writing: list[Future[None]] = []
        self._in_memory: Sequence[Future[None]] = ()  # what writes the last shard that came with its tensors
        self._names = {name for shard in finished for name in shard.names}
        self._made_parents: list[Path] = []
        self._sealed = self._broken = False

    def __enter__(self) -> CheckpointWriter:
        if self._kept:
            self._take_up()
            return self
        check_output(self.output, self.force, self.source)
        missing = [self.output.parent, *self.output.parent.parents]
        self._made_parents = [folder for folder in missing if not folder.exists()]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.output.parent, f".{self.output.name}.partial-")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.shutdown()
        failure = self._failure() if error is None else None
        if self.partial.exists() and not self._kept:
            shutil.rmtree(self.partial, ignore_errors=True)
            remove_empty(self._made_parents)
        if not self._kept and is_full_disk(cause := error or failure):
            raise UserError("the disk is full", str(self.output), "free some space or choose another folder") from cause
        if failure is not None:
            raise failure

    @property
    def shard_names(self) -> list[str]:
        """Final file names of the shards written so far."""
        count = len(self._shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each shard by its final name; call it after the last ``add``."""
        self._await(self._writing)
        return dict(zip(self.shard_names, (shard.sha256 for shard in self.shards), strict=True))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes ``tensors`` as one shard (several if too large) in the background, where one such shard waits at a
        time; they must not be changed afterwards. What went wrong is raised by the next call of a method.

        Raises:
            ValueError: a name was added before, or the folder is sealed.
        """
        self._require_new(tensors.keys())
        for names in _split(tensors, self.shard_bytes):
            self._await(self._in_memory)
            plain = _plain(tensors, names)
            self._append(names, sum(tensors[name].nbytes for name in names), [plain].pop)  # it keeps none itself
            self._in_memory = self._writing[-1:]

    def add_unread(self, names: Sequence[str], nbytes: int, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Writes one shard whose tensors are read in the background too, when all before it are written.

        Args:
            names: of the tensors that ``read`` returns.
            nbytes: of them all.
            read: its errors are raised by the next call of a method.

        Raises:
            ValueError: a name was added before, or the folder is sealed.
        """
        self._require_new(names)
        self._append(list(names), nbytes, lambda: _plain(read(), names))

    @property
    def number_of_shards(self) -> int:
        """Added so far, on disk or not yet."""
        return len(self._shards)

    def then(self, job: Callable[[], None]) -> None:
        """Runs a job in the background once everything added so far is on disk, which ``shards`` then tells of, and not
        at all if any of that failed. What goes wrong in it is raised by the next call of a method."""

        def unless_broken() -> None:
            if not self._broken:
                try:
                    job()
                except BaseException:
                    self._broken = True
                    raise

        self._writing.append(self._background.submit(unless_broken))

    def seal(
        self, files: Mapping[str, str | bytes], copy_from: Path | None = None, copy: Iterable[str] = COMPANIONS
    ) -> None:
        """Completes the folder under its hidden name ``partial``, where it can be read like any checkpoint.

        Args:
            files: contents by file name (config.json, recipe.yaml, …); they win over copied ones.
            copy_from: folder of the input model.
            copy: patterns of the files to copy from there.
        """
        self._await(self._writing)
        for source in companions(copy_from, copy) if copy_from else ():
            target = self.partial / source.relative_to(copy_from or "")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
            sync(target)
        for i, name in enumerate(self.shard_names):
            (self.partial / _temporary(i)).rename(self.partial / name)
        self._sealed = True
        if len(self._shards) > 1:
            self._write("model.safetensors.index.json", self._index())
        for name, content in files.items():
            self._write(name, content)

    def publish(self, files: Mapping[str, str | bytes] | None = None) -> None:
        """Adds ``files`` (what could be known only after ``seal``, as a report) and gives the folder its final name.

        Raises:
            UserError: an output appeared meanwhile that may not be replaced.
        """
        if not self._sealed:
            raise ValueError("publish follows seal")
        for name, content in (files or {}).items():
            self._write(name, content)
        sync(self.partial)
        check_output(self.output, self.force, self.source)
        self._replace()

    def finish(
        self, files: Mapping[str, str | bytes], copy_from: Path | None = None, copy: Iterable[str] = COMPANIONS
    ) -> None:
        """``seal`` and ``publish`` at once."""
        self.seal(files, copy_from, copy)
        self.publish()

    def _require_new(self, names: Collection[str]) -> None:
        if self._sealed:
            raise ValueError("the folder is sealed")
        if repeated := sorted(self._names.intersection(names)):
            raise ValueError(f"tensor {repeated[0]} was already written")

    def _append(self, names: list[str], nbytes: int, read: Callable[[], dict[str, Tensor]]) -> None:
        path = self.partial / _temporary(len(self._shards))
        self._shards.append(names)
        self._names.update(names)
        self.then(lambda: self._write_shard(path, read(), nbytes))
        self.total_bytes += nbytes

    def _await(self, jobs: Sequence[Future[None]]) -> None:
        """Waits until they are done, and raises what went wrong in anything that is done by then."""
        wait(jobs)
        if (failure := self._failure()) is not None:
            raise failure

    def _failure(self) -> BaseException | None:
        done = [job for job in self._writing if job.done()]
        self._writing = [job for job in self._writing if job not in done]
        return next((error for job in done if (error := job.exception())), None)

    def _write_shard(self, path: Path, tensors: dict[str, Tensor], nbytes: int) -> None:
        save_file(tensors, path, {"format": "pt"})
        tensors.clear()  # now: what follows waits for the disk
        release_freed_memory()
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
        with ThreadPoolExecutor(1) as aside:  # the processor reads it while the disk writes it
            written, digest = aside.submit(sync, path), sha256(path)
        written.result()
        self.shards.append(Shard(self._shards[len(self.shards)], digest, nbytes))

    def _take_up(self) -> None:
        """Leaves in the folder the finished shards alone, under the names they have while others follow."""
        self.partial.mkdir(exist_ok=True)
        for index in range(len(self.shards)):
            temporary = self.partial / _temporary(index)
            sealed = [*self.partial.glob(f"model-{index + 1:05d}-of-*.safetensors"), self.partial / "model.safetensors"]
            if not temporary.exists():
                next(file for file in sealed if file.exists()).rename(temporary)
        stays = {_temporary(index) for index in range(len(self.shards))}
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in stays:
                path.unlink()

    def _write(self, name: str, content: str | bytes) -> None:
        path = self.partial / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(path)

    def _index(self) -> str:
        where = {name: file for names, file in zip(self._shards, self.shard_names, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _replace(self) -> None:
        own = self.output.parent / f".{self.output.name}.replaced-{os.getpid()}"
        put_in_place(self.partial, self.output, self.partial.parent / REPLACED if self._kept else own)


def _temporary(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _split(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, cut so that each part has at most ``limit`` bytes; a larger tensor stands alone."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    if part:
        yield part


def _plain(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and each owning its memory, as the file format wants: no views, no two names of one."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        plain[name] = tensor.clone() if shared else tensor
        seen.add(storage.data_ptr())
    return plain
