"""The output folder: safetensors shards written one decoder block at a time, under the final name only when complete.

Everything is written into a hidden folder beside the final name, on the same file system, so that one rename publishes
it. Until then, and after any failure, nothing exists under the final name (or, with ``force``, the old folder does).

One shard at a time is written in the background, while the next block is compressed: disks are slow."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import UserError
from llmcompress.export.destination import RECORD, check_output, remove_abandoned

SHARD_BYTES = 5_000_000_000
"""A larger ``add`` is split: the size hubs and loaders are used to."""

COMPANIONS = (
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model
    "vocab*",
    "merges*",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",  # a compressed model is a derivative: its licence travels with it
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the files that a checkpoint needs beside its weights and that compression does not change."""

REMOTE_CODE = ("*.py",)
"""What a model with code of its own needs too."""

NEVER_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl")
"""Endings of weight files; no pattern brings them along."""


class CheckpointWriter:
    """Writes one checkpoint folder; use as a context manager and call ``finish`` (or ``seal``, ``publish``) last.

    Leaving the context before, or by an exception, removes everything that was written; a disk that filled up leaves it
    as a `UserError`. What a killed process left behind is removed when the next one enters.

    Args:
        output: final name of the folder.
        force: replace an earlier output of this program.
        source: folder of the input model, which is never replaced.
        shard_bytes: split a call of ``add`` above this many bytes of tensors.
    """

    def __init__(
        self, output: Path, force: bool = False, source: Path | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.output, self.force, self.source, self.shard_bytes = Path(output).absolute(), force, source, shard_bytes
        self.partial = self.output.parent / f".{self.output.name}.partial-{os.getpid()}"
        self.total_bytes = 0  # of all tensors so far
        self._shards: list[list[str]] = []  # tensor names of each shard
        self._digests: list[str] = []
        self._background = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[str] | None = None  # the last shard's digest
        self._names: set[str] = set()
        self._made_parents: list[Path] = []
        self._sealed = False

    def __enter__(self) -> CheckpointWriter:
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
        failure = self._writing.exception() if self._writing and error is None else None
        if self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)
            for folder in self._made_parents:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        if _is_full_disk(error or failure):
            raise UserError("the disk is full", str(self.output), "free some space or choose another --output") from (
                error or failure
            )
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
        self._await_writing()
        return dict(zip(self.shard_names, self._digests, strict=True))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes ``tensors`` as one shard (several if too large) once the shard before is written, in the background;
        they must not be changed afterwards. What went wrong is raised by the next call of a method.

        Raises:
            ValueError: a name was added before, or the folder is sealed.
        """
        if self._sealed:
            raise ValueError("the folder is sealed")
        repeated = sorted(self._names & tensors.keys())
        if repeated:
            raise ValueError(f"tensor {repeated[0]} was already written")
        for names in _split(tensors, self.shard_bytes):
            self._await_writing()
            path = self.partial / _temporary(len(self._shards))
            self._writing = self._background.submit(_write_shard, path, _plain(tensors, names))
            self._shards.append(names)
            self._names.update(names)
            self.total_bytes += sum(tensors[name].nbytes for name in names)

    def seal(
        self, files: Mapping[str, str | bytes], copy_from: Path | None = None, copy: Iterable[str] = COMPANIONS
    ) -> None:
        """Completes the folder under its hidden name ``partial``, where it can be read like any checkpoint.

        Args:
            files: contents by file name (config.json, recipe.yaml, …); they win over copied ones.
            copy_from: folder of the input model.
            copy: patterns of the files to copy from there.
        """
        self._await_writing()
        for source in _matching(copy_from, copy) if copy_from else ():
            target = self.partial / source.relative_to(copy_from or "")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
            _sync(target)
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
        _sync(self.partial)
        check_output(self.output, self.force, self.source)
        self._replace()

    def finish(
        self, files: Mapping[str, str | bytes], copy_from: Path | None = None, copy: Iterable[str] = COMPANIONS
    ) -> None:
        """``seal`` and ``publish`` at once."""
        self.seal(files, copy_from, copy)
        self.publish()

    def _await_writing(self) -> None:
        """Waits until the last shard is on disk, and raises what kept it from getting there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._digests.append(writing.result())

    def _write(self, name: str, content: str | bytes) -> None:
        path = self.partial / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(path)

    def _index(self) -> str:
        where = {name: file for names, file in zip(self._shards, self.shard_names, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _replace(self) -> None:
        """Renames the old folder away, the new one in, and only then deletes the old one."""
        old = self.output.parent / f".{self.output.name}.replaced-{os.getpid()}"
        replacing = self.output.exists()
        if replacing:
            self.output.rename(old)
        try:
            self.partial.rename(self.output)
        except BaseException:
            if replacing:
                old.rename(self.output)
            raise
        _sync(self.output.parent)
        if replacing:
            shutil.rmtree(old)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes one file and returns its sha256."""
    save_file(tensors, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
    _sync(path)
    return _sha256(path)


def _is_full_disk(error: BaseException | None) -> bool:
    """The safetensors library tells the system's error in words only."""
    if isinstance(error, SafetensorError):
        return f"os error {errno.ENOSPC}" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in NEVER_COPIED and path.name != RECORD)


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
