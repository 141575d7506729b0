"""Feeds the program bad input and sees that it behaves: `python scripts/fuzz.py --seconds 60 --seed 0`.

Each input is a sound one with a few things changed: a recipe, config.json, the header of a safetensors file, an
index, calibration lines, tokenizer.json, a record, or arguments of --set. The program has to end with exit code 0, or
with 2 and one line; inspect may say 1. It fails an input if it raises, prints a traceback, takes longer than 20 seconds
or more than 2 GiB of memory, opens a file for writing outside the folder it may write to, or runs code that lies in the
checkpoint.

Inputs are numbered: the same seed and number give the same input, `--only config:17` repeats one. Exits with 1 if any
input failed; what failed is kept in `--keep FOLDER`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_inputs import KEYS, as_json, mangled, mutated, value, written

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS_EACH = 20
MEMORY_EACH = 2 << 30
RECIPES = ("jsq", "sparsegpt-2of4", "gptq-w4a16", "smoothquant-w8a8", "llm-pruner-20", "omniquant-w4a16", "jsq-plus")
WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]


class TookTooLong(BaseException):
    """An input is not done in time."""


class Fuzzer:
    """Sound inputs in a scratch folder, and what becomes of changed ones."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.seed = scratch, seed
        self.sound = scratch / "sound"
        self.marker = scratch / "code-was-run"
        self.allowed = (str(scratch), "/dev/", "/proc/")
        self.escaped: list[str] = []
        self.watching = False
        self.codes: Counter[int] = Counter()
        self._make_sound()
        sys.addaudithook(self._audit)

    def _make_sound(self) -> None:
        """A tiny Llama with a tokenizer, in two shards, with code and a pickle that say so when they run."""
        from safetensors.torch import save_file
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, max_position_embeddings=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(self.sound)
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        (self.sound / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-1.safetensors": names[:10], "model-2.safetensors": names[10:]}
        for file, own in shards.items():
            save_file({name: tensors[name] for name in own}, self.sound / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
        (self.sound / "model.safetensors.index.json").write_text(json.dumps(index))
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(self.sound)
        code = f"open({str(self.marker)!r}, 'w')\n"
        (self.sound / "modeling_evil.py").write_text(code)
        (self.sound / "pytorch_model.bin").write_bytes(f"cbuiltins\nexec\n(S{code.strip()!r}\ntR.".encode())

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path, _, flags = arguments
        name = os.path.abspath(os.fsdecode(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not (
            name.startswith(self.allowed) or "__pycache__" in name
        ):
            self.escaped.append(name)

    def folder(self) -> Path:
        """A fresh copy of the sound checkpoint."""
        target = self.scratch / "input"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.sound, target)
        return target

    # --- what is changed ---

    def recipe(self, rng: random.Random) -> list[list[str]]:
        import yaml

        from llmcompress.resources import configs_dir

        file = self.scratch / "own.yaml"
        text = (configs_dir() / f"{rng.choice(RECIPES)}.yaml").read_text()
        tree = mutated(yaml.safe_load(text), rng)
        content = mangled(text.encode(), rng) if rng.random() < 0.4 else as_json(tree)
        if rng.random() < 0.03:
            levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'lol'}]" for i in range(12)]
            content = ("\n".join(levels) + "\nstages: *a11\n").encode()
        file.write_bytes(content)
        return [self._compress(self.sound, file)]

    def config(self, rng: random.Random) -> list[list[str]]:
        folder = self.folder()
        tree = json.loads((folder / "config.json").read_text())
        if rng.random() < 0.1:
            tree |= {"auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}}
            tree["model_type"] = rng.choice(("llama", "own"))
        (folder / "config.json").write_bytes(written(mutated(tree, rng), rng))
        return self._both(folder, rng)

    def header(self, rng: random.Random) -> list[list[str]]:
        folder = self.folder()
        file = folder / "model-1.safetensors"
        content = file.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        if rng.random() < 0.3:
            file.write_bytes(mangled(content, rng))
        else:
            header = written(mutated(json.loads(content[8 : 8 + length]), rng), rng)
            said = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, 2**64 - 1, length * 2))
            file.write_bytes(struct.pack("<Q", said) + header + content[8 + length :])
        return self._both(folder, rng)

    def index(self, rng: random.Random) -> list[list[str]]:
        folder = self.folder()
        file = folder / "model.safetensors.index.json"
        file.write_bytes(written(mutated(json.loads(file.read_text()), rng), rng))
        if rng.random() < 0.1:
            (folder / "model-1.safetensors").unlink()
            (folder / "model-1.safetensors").symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "nowhere", ".")))
        return self._both(folder, rng)

    def lines(self, rng: random.Random) -> list[list[str]]:
        file = self.scratch / "rows.jsonl"
        sound = [
            {"text": " ".join(WORDS[3:])},
            {"prompt": "w1 w2", "completion": "w3"},
            {"messages": [{"role": "user"}]},
        ]
        records = [mutated(rng.choice(sound), rng) if rng.random() < 0.5 else sound[0] for _ in range(4)]
        content = b"\n".join(as_json(record) for record in records)
        file.write_bytes(mangled(content, rng) if rng.random() < 0.3 else content)
        return [self._compress(self.sound, "wanda-2of4", calibration=file, full=True)]

    def tokenizer(self, rng: random.Random) -> list[list[str]]:
        folder = self.folder()
        file = folder / rng.choice(("tokenizer.json", "tokenizer_config.json"))
        file.write_bytes(written(mutated(json.loads(file.read_text()), rng), rng))
        rows = self.scratch / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"text": " ".join(WORDS[3:])}) for _ in range(4)))
        return [self._compress(folder, "wanda-2of4", calibration=rows, full=True)]

    def record(self, rng: random.Random) -> list[list[str]]:
        from llmcompress import cli

        made = self.scratch / "made"
        if not made.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                code = cli.main([*self._compress(self.sound, "jsq", full=True)[:-2], "--output", str(made)])
            assert code == 0
        folder = self.scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        file = folder / rng.choice(("llmcompress.json", "report.json", "config.json", "recipe.yaml", "README.md"))
        if file.suffix == ".json" and rng.random() < 0.8:
            file.write_bytes(written(mutated(json.loads(file.read_text()), rng), rng))
        else:
            file.write_bytes(mangled(file.read_bytes(), rng))
        return [["inspect", str(folder)]]

    def override(self, rng: random.Random) -> list[list[str]]:
        key = f"{rng.choice(KEYS)}.{rng.choice(KEYS)}"
        said = value(rng)
        text = said if isinstance(said, str) else json.dumps(said)
        text = text.replace("\x00", "")[:5000]
        line = rng.choice((f"{key}={text}", f"prune.sparsity={text}", f"quantize.weights={text}", text))
        return [[*self._compress(self.sound, rng.choice(RECIPES)), "--set", line]]

    # --- how it is run ---

    def _both(self, folder: Path, rng: random.Random) -> list[list[str]]:
        runs = [self._compress(folder, "wanda-2of4", full=rng.random() < 0.2)]
        return [*runs, ["inspect", str(folder)]] if rng.random() < 0.3 else runs

    def _compress(self, model: Path, recipe: object, calibration: object = "self", full: bool = False) -> list[str]:
        shutil.rmtree(self.scratch / "out", ignore_errors=True)
        how = ["--no-eval", "--json"] if full else ["--dry-run"]
        given = ["--model", model, "--recipe", recipe, "--calibration", calibration, "--samples", 2, "--length", 16]
        return [str(a) for a in (*given, *how, "--output", self.scratch / "out")]

    def run(self, target: str, number: int) -> str:
        """Why an input failed; empty if the program behaved."""
        rng = random.Random(f"{self.seed}:{target}:{number}")
        for arguments in getattr(self, target)(rng):
            complaint = self._one(arguments)
            if complaint:
                return f"{complaint}\n  {' '.join(arguments)[:300]}"
        return ""

    def _one(self, arguments: list[str]) -> str:
        from llmcompress import cli

        self.escaped.clear()
        out, err = io.StringIO(), io.StringIO()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        set_timers(SECONDS_EACH)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                self.watching = True
                code = cli.main(arguments)
        except TookTooLong:
            return f"takes longer than {SECONDS_EACH} s: {innermost()}"
        except BaseException as error:
            return f"{type(error).__name__} at {innermost()}\n  {str(error)[:200]}"
        finally:
            self.watching = False
            set_timers(0)
        return self._judged(arguments, code, err.getvalue(), resident("VmHWM") - before)

    def _judged(self, arguments: list[str], code: int, err: str, taken: int) -> str:
        said = [line for line in err.splitlines() if line.startswith("llmcompress: ")]
        if self.marker.exists():
            self.marker.unlink()
            return "code of the checkpoint was run"
        if self.escaped:
            return f"wrote outside: {self.escaped[0]}"
        if taken > MEMORY_EACH:
            return f"took {taken >> 20} MiB of memory"
        if code == 2 and (len(said) != 1 or "Traceback" in err or err.count("\n") != 1):
            return f"exit code 2 and {err.count(chr(10))} lines: {err[:300]!r}"
        allowed = (0, 1, 2) if arguments[0] == "inspect" else (0, 2)
        if code not in allowed:
            return f"exit code {code}"
        self.codes[code] += 1
        return ""


def resident(key: str) -> int:
    """Bytes, as the system counts them for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def innermost() -> str:
    """Where the exception being handled came from: the last line of this program, and the last of all."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [f for f in frames if "/llmcompress/" in f.filename] or list(frames)
    return " ← ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (frames[-1], own[-1]))


TARGETS = ("recipe", "config", "header", "index", "lines", "tokenizer", "record", "override")
#: how many inputs a round gives the targets that mostly end before a model is built
OFTEN = {"recipe": 8, "override": 4, "header": 4, "index": 4, "config": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed the program bad input and see that it behaves.")
    parser.add_argument("--seconds", type=float, default=60, help="stop after this long (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="TARGET")
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="repeat one input, with its traceback")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy inputs that fail to this folder")
    options = parser.parse_args()
    limit_memory()
    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(Path(scratch).resolve(), options.seed)
        if options.only:
            target, _, number = options.only.partition(":")
            complaint = fuzzer.run(target, int(number))
            print(complaint or "behaves")
            if options.keep:
                shutil.copytree(scratch, options.keep, dirs_exist_ok=True, symlinks=True)
            return int(bool(complaint))
        return campaign(fuzzer, options)


def campaign(fuzzer: Fuzzer, options: argparse.Namespace) -> int:
    """All targets in turn until the time is over."""
    tried: Counter[str] = Counter()
    failures: dict[str, list[str]] = {}
    stop = time.monotonic() + options.seconds
    turns = [target for target in options.targets for _ in range(OFTEN.get(target, 1))]
    while time.monotonic() < stop:
        for target in turns:
            number = tried[target]
            tried[target] += 1
            complaint = fuzzer.run(target, number)
            if not complaint:
                continue
            failures.setdefault(f"{target}: {complaint.splitlines()[0]}"[:160], []).append(f"{target}:{number}")
            print(f"{target}:{number}: {complaint}", flush=True)
            if options.keep:
                kept = options.keep / f"{target}-{number}"
                shutil.copytree(fuzzer.scratch, kept, symlinks=True, dirs_exist_ok=True)
    print(f"{sum(tried.values())} inputs: " + ", ".join(f"{target} {count}" for target, count in tried.items()))
    print("runs by exit code: " + ", ".join(f"{code}: {n}" for code, n in sorted(fuzzer.codes.items())))
    print(f"{sum(map(len, failures.values()))} failures of {len(failures)} kinds")
    for kind, where in failures.items():
        print(f"  {len(where)} × {kind}   ({where[0]})")
    return int(bool(failures))


def limit_memory() -> None:
    """What asks for far more than there should be gets an error instead of the machine."""
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    size = resident("VmSize") + (12 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def set_timers(seconds: float) -> None:
    """Of the processor's time, and of the clock's for what waits for something; 0 stops them."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def too_long(*_: object) -> None:
    raise TookTooLong


if __name__ == "__main__":
    sys.exit(main())
