"""Tasks: names and files are checked before long work, and lm-eval's figures are ours."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import api
from llmcompress.errors import UserError
from llmcompress.evaluate import catalogue, harness
from llmcompress.evaluate.accuracy import TaskQuality, task_qualities
from llmcompress.evaluate.harness import HarnessModel
from llmcompress.evaluate.result import Evaluation
from llmcompress.evaluate.tasks import Wanted, local_tasks, parse_tasks
from llmcompress.progress import Progress
from llmcompress.resources import eval_dir
from tests.architectures import tiny_folder

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 minimal pairs of two phenomena in words that the tiny tokenizer knows."""
    file = tmp_path_factory.mktemp("tasks") / "pairs.jsonl"
    rows = [
        {"good": f"w{i} w{i + 1} w{i * 7 % 90}", "bad": f"w{i} w{i * 5 % 90} w{i + 1}", "phenomenon": "ab"[i % 2]}
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def other(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "other", seed=1)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def evaluated(model: Path, reference: Path | None, *tasks: str, **options: Any) -> Evaluation:
    return api.evaluate(model, reference, api.EvalOptions(tasks=tasks, **options))


def score(model: Any, tokenizer: Any, sentence: str) -> float:
    """Log-likelihood of a sentence after the end-of-sequence token, with the space that lm-eval puts before choices."""
    tokens = torch.tensor([[1, *tokenizer(" " + sentence)["input_ids"]]])
    with torch.no_grad():
        logs = model(tokens).logits.double().log_softmax(-1)
    return float(logs[0, :-1].gather(1, tokens[0, 1:, None]).sum())


def test_minimal_pairs_are_right_where_the_good_sentence_is_likelier(
    checkpoint: Path, other: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "LOGITS", 96 * 4 * 7)  # seven sequences a batch
    found = evaluated(other, checkpoint, f"blimp_local={pairs}").tasks
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    right = []
    for folder in (other, checkpoint):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        right.append(np.array([score(model, tokenizer, r["good"]) > score(model, tokenizer, r["bad"]) for r in rows]))
    whole, *parts = found
    assert (whole.task, whole.metric, whole.items, whole.level) == ("blimp_local", "acc", 60, "task")
    assert whole.value.value == pytest.approx(right[0].mean())
    assert whole.beside is not None and whole.beside.reference == pytest.approx(right[1].mean())
    assert (whole.beside.gained, whole.beside.lost) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
    expected = stats.binomtest(whole.beside.gained or 0, (whole.beside.gained or 0) + (whole.beside.lost or 0)).pvalue
    assert whole.beside.test == "mcnemar" and whole.beside.p == pytest.approx(expected)
    assert [(part.task, part.items, part.of) for part in parts] == [("a", 30, "blimp_local"), ("b", 30, "blimp_local")]
    assert [part.value.value for part in parts] == [pytest.approx(right[0][start::2].mean()) for start in (0, 1)]
    assert whole.value.low is not None and whole.value.high is not None
    assert whole.value.low < whole.value.value < whole.value.high


def test_our_perplexity_is_that_of_lm_eval(checkpoint: Path, text: Path) -> None:
    found = api.evaluate(
        checkpoint, None, api.EvalOptions(texts=(str(text),), tasks=(f"text_local={text}",), length=24)
    )
    theirs = {row.metric: row.value.value for row in found.tasks}
    ours = found.texts[0].perplexity
    assert ours.word is not None and ours.byte is not None
    assert ours.word.value == pytest.approx(theirs["word_perplexity"], rel=1e-5)
    assert ours.byte.value == pytest.approx(theirs["byte_perplexity"], rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


def test_a_simulated_model_is_judged_with_rounded_inputs_in_tasks_too(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = api.Options(calibration=str(text), samples=2, length=16, evaluate=False)
    overrides = ["quantize.activations={bits: 2, group: token, symmetric: true}"]
    api.compress(checkpoint, "rtn-w8a8", tmp_path / "out", options, overrides=overrides)
    both = api.EvalOptions(texts=(str(text),), tasks=(f"text_local={text}",), length=24)
    found, dense = (api.evaluate(folder, None, both) for folder in (tmp_path / "out", checkpoint))
    ours, theirs = found.texts[0].perplexity.byte, found.tasks[1].value
    assert found.tasks[1].metric == "byte_perplexity" and ours is not None
    assert ours.value == pytest.approx(theirs.value, rel=1e-5)
    assert abs(theirs.value / dense.tasks[1].value.value - 1) > 1e-4


def test_questions_of_ones_own_and_a_task_file_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    data = eval_dir() / "choices_example.jsonl"
    own = tmp_path / "my_task.yaml"
    own.write_text((eval_dir() / "choices_local.yaml").read_text().replace("task: choices_local", "task: mine"))
    found = evaluated(checkpoint, None, f"choices_local={data},{own}={data}").tasks
    assert [(r.task, r.metric, r.items) for r in found] == [
        ("choices_local", "acc", 3), ("choices_local", "acc_norm", 3), ("mine", "acc", 3), ("mine", "acc_norm", 3),
    ]  # fmt: skip
    assert found[0].value == found[2].value


def test_a_limit_is_on_the_items_of_each_task(checkpoint: Path, pairs: Path) -> None:
    assert evaluated(checkpoint, None, f"blimp_local={pairs}", limit=5).tasks[0].items == 5


def results(values: dict[str, list[float]], group: str, aggregate: float) -> dict[str, Any]:
    """What lm-eval returns of tasks with accuracies, and of a group of them."""
    return {
        "samples": {t: [{"filter": "none", "acc": v, "doc": {}} for v in x] for t, x in values.items()},
        "results": {t: {"name": t, "acc,none": float(np.mean(x)), "acc_stderr,none": "N/A"} for t, x in values.items()}
        | {group: {"acc,none": aggregate}},
        "groups": {group: {}},
        "group_subtasks": {group: list(values)},
        "n-samples": {t: {"effective": len(x)} for t, x in values.items()},
        "n-shot": dict.fromkeys(values, 0),
        "configs": {t: {} for t in values},
        "higher_is_better": {t: {"acc": True} for t in values},
        "versions": {},
    }


def rows_of(model: dict[str, list[float]], reference: dict[str, list[float]], macro: bool) -> dict[str, TaskQuality]:
    def mean(values: dict[str, list[float]]) -> float:
        return float(
            np.mean([np.mean(x) for x in values.values()] if macro else list(chain.from_iterable(values.values())))
        )

    rows = task_qualities(results(model, "all", mean(model)), results(reference, "all", mean(reference)), seed=0)
    return {row.task: row for row in rows}


def test_a_group_by_items_is_tested_on_all_of_them_and_one_by_tasks_with_the_tasks_weights() -> None:
    generator = np.random.default_rng(0)
    model = {"x": generator.integers(0, 2, 40).astype(float).tolist(), "y": [1.0] * 9 + [0.0]}
    reference = {"x": [1.0] * 30 + [0.0] * 10, "y": [1.0] * 8 + [0.0] * 2}
    ours, theirs = (np.array(values["x"] + values["y"]) for values in (model, reference))
    gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    micro, macro = (rows_of(model, reference, macro)["all"] for macro in (False, True))
    assert micro.level == "group" and micro.items == 50 and micro.beside is not None and macro.beside is not None
    assert micro.beside.test == "mcnemar" and micro.beside.p == pytest.approx(
        stats.binomtest(gained, gained + lost).pvalue
    )
    assert macro.beside.test == "permutation" and macro.value.value == pytest.approx((np.mean(model["x"]) + 0.9) / 2)
    assert macro.value.low is not None and macro.value.high is not None
    assert macro.value.low < macro.value.value < macro.value.high


def test_many_comparisons_need_a_smaller_p() -> None:
    """Nine wins to one is p = 0.02: enough alone, not as one of twenty."""
    model, reference = [1.0] * 9 + [0.0], [0.0] * 9 + [1.0]
    same = [1.0, 0.0] * 5
    crowd = {f"t{i}": same for i in range(19)}
    alone = rows_of({"only": model}, {"only": reference}, macro=True)["only"]
    among = rows_of({"only": model, **crowd}, {"only": reference, **crowd}, macro=True)["only"]
    assert alone.beside is not None and among.beside is not None
    assert alone.beside.verdict == "better" and among.beside.verdict == "within noise"
    assert among.beside.p == alone.beside.p and among.beside.p_adjusted == pytest.approx(20 * (alone.beside.p or 0))


def test_batches_hold_as_much_as_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = HarnessModel(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
        64,
        Progress(),
        "tiny",
    )
    monkeypatch.setattr(harness, "LOGITS", wrapped.vocab_size * 100)
    requests = [(("", ""), [0] * 9, [0] * 11), (("", ""), [0], [0])]
    assert [wrapped._batch_scheduler(place, requests) for place in (0, 1)] == [5, 50]
    assert wrapped._detect_batch_size() == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("blimp_local", "reads a .jsonl file of minimal pairs of yours; write blimp_local=FILE"),
        ("blimp_lokal=x.jsonl", "takes no file; did you mean 'blimp_local'?"),
        ("blimp_local=none.jsonl", "no such file"),
        ("blimp_local=", "an empty name"),
        ("blimp_local=empty.jsonl", "is empty"),
        ("blimp_local=wrong.jsonl", "wrong.jsonl, line 2: has no bad, but good"),
        ("blimp_local=broken.jsonl", "broken.jsonl, line 1: is not JSON"),
        ("missing.yaml", "no such file"),
        ("list.yaml", "is no task of lm-eval"),
        ("hellaswagg", "no such task; did you mean hellaswag"),
        ("a,,b", "an empty name"),
    ],
)
def test_a_task_that_cannot_run_is_told_in_one_line_before_any_model_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("wrong.jsonl").write_text('{"good": "w1", "bad": "w2"}\n{"good": "w1"}\n')
    Path("broken.jsonl").write_text("w1 w2\n")
    Path("list.yaml").write_text("- 1\n")
    monkeypatch.setattr(api.EvaluationRun, "execute", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(UserError) as error:
        evaluated(checkpoint, None, entry)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_that_is_not_here_is_one_line_without_a_network(checkpoint: Path) -> None:
    with pytest.raises(
        UserError, match=r"--tasks piqa: cannot be loaded .*baber/piqa.*; connect to the network once"
    ) as e:
        evaluated(checkpoint, None, "piqa")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["jsq_table", "mmlu", "ai2_arc"])
def test_a_name_is_found_with_everything_it_is_made_of(name: str) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    folders = catalogue._folders([name], tasks.TaskManager)
    index = tasks.TaskManager(include_path=[str(eval_dir()), *map(str, folders)], include_defaults=False).task_index
    wanted, seen = {name}, set()
    while wanted:
        assert wanted <= index.keys()
        seen |= wanted
        wanted = {m for n in wanted for m in [*catalogue._members(index[n]), *index[n].tags] if m in index} - seen
    assert len(seen) > 2 and len(index) < 3000


def test_without_lm_eval_one_line_says_how_to_get_it(
    checkpoint: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"lm-eval is not installed .* pip install 'llmcompress\[eval\]'"):
        evaluated(checkpoint, None, f"blimp_local={pairs}")


def test_tasks_are_split_at_commas_and_taken_once(pairs: Path) -> None:
    assert parse_tasks(["piqa, arc_easy", f"piqa,blimp_local={pairs}"]) == [
        Wanted("piqa"), Wanted("arc_easy"), Wanted("blimp_local", pairs),
    ]  # fmt: skip


def test_every_local_task_says_what_it_reads_and_how_to_run_it() -> None:
    guide = (eval_dir() / "README.md").read_text(encoding="utf-8")
    for name, config in local_tasks().items():
        first = (eval_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# python -m llmcompress eval ") and f"--tasks {name}=" in first
        assert config["metadata"]["data"].startswith("a ") and f"`{name}" in guide
