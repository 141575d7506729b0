"""A random Llama of 1.1 billion parameters (TinyLlama's shape) as it runs on a CPU: dense, in this program's formats
and runtime, in bitsandbytes', as transformers runs llm-compressor's W8A8 folder, and with a fifth of its blocks gone.

    python scripts/bench_runtime.py prepare --work DIR     # makes the folders: minutes, 12 GB of disk
    python scripts/bench_runtime.py logits --work DIR      # how far the kernels are from the simulated model
    python scripts/bench_runtime.py measure --work DIR     # one round of every variant; repeat it for more
    python scripts/bench_runtime.py show

Every variant runs in a process of its own: 512 random tokens of prompt, then tokens one by one with a KV cache, all in
bfloat16 on ``--threads`` threads. ``measure`` takes the variants with the fewest rounds first and begins none after
``--seconds``. Rounds are collected in scripts/results/runtime.json; ratios are to the dense model in bfloat16 through
transformers. ``process`` is the resident memory of the whole process, ``model`` how much more that is than before
loading, when torch and transformers take some 0.36 GiB, of which `load` gives a part back.

bitsandbytes and the environment of llm-compressor (``make bench-setup``) are needed by ``prepare`` only."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import PRESETS, write_checkpoint
from safetensors.torch import load_file, save_file

from llmcompress.runtime.bench import Variant, machine, measure_once
from llmcompress.runtime.bench_worker import Job, Round

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "runtime.json"
SHAPE = replace(PRESETS["tinyllama-block"], blocks=22)
W4A16 = "description: 4-bit weights in groups of 128\nstages:\n  - quantize: {method: rtn, weights: int4-g128}\n"
#: name in the table → folder, runtime
VARIANTS = {
    "dense bfloat16, transformers": ("dense", "dense"),
    "W8A8": ("rtn-w8a8", "int8"),
    "W4A16": ("rtn-w4a16", "int4"),
    "llm-compressor W8A8, transformers": ("llm-compressor-w8a8", "dense"),
    "bitsandbytes int8, transformers": ("bitsandbytes-int8", "dense"),
    "bitsandbytes NF4, transformers": ("bitsandbytes-nf4", "dense"),
    "LLM-Pruner 20 %, transformers": ("llm-pruner-20", "dense"),
    "LLM-Pruner 20 % + W8A8": ("llm-pruner-w8a8", "int8"),
}
REFERENCE = "dense bfloat16, transformers"
#: variant → figure → bound: at least for rates, at most for memory
TARGETS = {
    "W8A8": {"decode": 1.6, "prefill": 1.3, "process": 0.6, "model": 0.6},
    "W4A16": {"decode": 2.0, "process": 0.4, "model": 0.4},
}


def prepare(work: Path, peer_python: Path, only: list[str]) -> None:
    """Makes the folders that are missing."""
    dense, rows = work / "dense", work / "rows.safetensors"
    if not dense.exists():
        write_checkpoint(dense, SHAPE)
    if not rows.exists():
        save_file({"input_ids": torch.randint(3, SHAPE.vocab, (2, 64))}, rows)
    (work / "rtn-w4a16.yaml").write_text(W4A16)
    for name, _ in VARIANTS.values():
        folder = work / name
        if folder.exists() or name == "dense" or (only and name not in only):
            continue
        print(f"{name} …", flush=True)
        if name.startswith("bitsandbytes"):
            _bitsandbytes(dense, folder, name.endswith("nf4"))
        elif name.startswith("llm-compressor"):
            _llm_compressor(dense, folder, rows, peer_python)
        else:
            recipe = str(work / "rtn-w4a16.yaml") if name == "rtn-w4a16" else name
            _compress(dense, folder, rows, recipe)


def _compress(dense: Path, folder: Path, rows: Path, recipe: str) -> None:
    command = [sys.executable, "-m", "llmcompress", "--model", dense, "--recipe", recipe, "--output", folder]
    command += ["--calibration", rows, "--samples", "2", "--length", "64", "--no-eval"]
    subprocess.run([str(part) for part in command], check=True)


def _bitsandbytes(dense: Path, folder: Path, nf4: bool) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    config = four if nf4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)


def _llm_compressor(dense: Path, folder: Path, rows: Path, python: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        job = {"program": "llm-compressor", "recipe": "rtn-w8a8", "checkpoint": str(dense), "output": str(folder)}
        job |= {"tokens": str(rows), "samples": 2, "length": 64, "peer_batch": 2, "dtype": "bfloat16", "threads": 2}
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job | {"device": "cpu", "result": f"{scratch}/result.json"}))
        subprocess.run([str(python), str(HERE / "bench_peers_worker.py"), str(file)], check=True)


def measure(work: Path, threads: int, prompt: int, new: int, seconds: float) -> None:
    """One round of every variant that there is time for."""
    began, content = time.perf_counter(), _read()
    content |= {"machine": machine(threads), "prompt": prompt, "new": new}
    rounds: dict[str, list[dict[str, Any]]] = content.setdefault("rounds", {})
    present = [name for name, (folder, _) in VARIANTS.items() if (work / folder).exists()]
    for name in sorted(present, key=lambda name: len(rounds.get(name, []))):
        if time.perf_counter() - began > seconds:
            break
        folder, runtime = VARIANTS[name]
        variant = Variant(name, Job(str(work / folder), "bfloat16", runtime, prompt, new, (1,), threads))
        rounds.setdefault(name, []).append(asdict(measure_once(variant)))
        content.setdefault("disk_bytes", {})[name] = variant.disk_bytes
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def logits(work: Path, threads: int) -> None:
    """Relative distance of the kernels' logits from those of the simulated model, in bfloat16 and in float32."""
    content = _read()
    with tempfile.TemporaryDirectory() as scratch:

        def run(folder: str, runtime: str, dtype: str) -> torch.Tensor:
            file = Path(scratch) / f"{folder}-{runtime}-{dtype}.safetensors"
            job = Job(str(work / folder), dtype, runtime, 8, 1, (), threads, logits=str(file))
            measure_once(Variant(folder, job))
            return load_file(file)["logits"]

        for name in ("W8A8", "W4A16"):
            folder, runtime = VARIANTS[name]
            ours, theirs = run(folder, runtime, "bfloat16"), run(folder, "dense", "bfloat16")
            exact, alone = run(folder, "dense", "float32"), run(folder, runtime, "float32")
            distances = {
                "kernels in a float32 model from simulated in float32": _distance(alone, exact),
                "kernels from simulated in bfloat16": _distance(ours, theirs),
                "kernels from simulated in float32": _distance(ours, exact),
                "simulated in bfloat16 from simulated in float32": _distance(theirs, exact),
            }
            content.setdefault("logits", {})[name] = distances
            print(name, distances, flush=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def show() -> str:
    """The table, in Markdown."""
    content = _read()
    measured = {name: [Round(**found) for found in rounds] for name, rounds in content["rounds"].items()}
    lines = [
        "| | decode tok/s | × | prefill tok/s | × | process GiB | × | model GiB | × | on disk GiB |",
        "|---" * 10 + "|",
    ]
    dense = _figures(measured[REFERENCE], content["prompt"])
    for name in VARIANTS:
        if name not in measured:
            continue
        found = _figures(measured[name], content["prompt"])
        cells = [
            f"{found[key]:.{2 if key in ('process', 'model') else 1}f} | {found[key] / dense[key]:.2f}" for key in dense
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {content['disk_bytes'][name] / 2**30:.2f} |")
        for key, bound in TARGETS.get(name, {}).items():
            ratio = found[key] / dense[key]
            held = ratio <= bound if key in ("process", "model") else ratio >= bound
            print(f"{name} {key} {ratio:.2f}, wanted {bound}: {'yes' if held else 'NO'}", file=sys.stderr)
    return "\n".join(lines)


def _figures(rounds: list[Round], prompt: int) -> dict[str, float]:
    """Medians over all rounds."""

    def middle(kind: str) -> float:
        return statistics.median(second for found in rounds for second in getattr(found, kind)["1"])

    return {
        "decode": 1 / middle("decode"),
        "prefill": prompt / middle("prefill"),
        "process": statistics.median(found.resident_bytes for found in rounds) / 2**30,
        "model": statistics.median(found.resident_bytes - found.base_bytes for found in rounds) / 2**30,
    }


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Does what the first word says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "logits", "measure", "show"])
    parser.add_argument("--work", type=Path, help="folder of the models")
    parser.add_argument("--only", nargs="*", default=[], help="folders to prepare")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1e9, help="measure: begin no variant after so many")
    parser.add_argument("--peer-python", type=Path, default=HERE.parent / ".venv-bench" / "bin" / "python")
    options = parser.parse_args()
    if options.what == "show":
        print(show())
        return
    if options.work is None:
        parser.error("--work DIR is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "prepare":
        prepare(options.work, options.peer_python, options.only)
    elif options.what == "logits":
        logits(options.work, options.threads)
    else:
        measure(options.work, options.threads, options.prompt, options.new, options.seconds)


if __name__ == "__main__":
    main()
