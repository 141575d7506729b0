"""What a compressed folder is worth on a whole text, as the papers measure it: perplexity per token and per word.

    python scripts/perplexity.py --model meta-llama/Llama-2-7b-hf --result compressed/wanda-50 \\
        --text wikitext2-raw-test.txt --length 2048

The text is tokenised in one piece and cut into rows of ``--length`` tokens, all of them; perplexity per word is over
the words that begin in predicted tokens (`table_jsq_judge`). Both models go block by block, in lockstep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from table_jsq_judge import EvalText, per_word

from llmcompress.api import Options
from llmcompress.errors import UserError
from llmcompress.evaluate.stream import compare
from llmcompress.model.checkpoint import Checkpoint
from llmcompress.run import Source


def main(argv: list[str] | None = None) -> int:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PRESET|FOLDER|HUB_ID", help="the dense model")
    parser.add_argument("--result", required=True, type=Path, metavar="FOLDER", help="what was made of it")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row (default: 2048)")
    parser.add_argument("--rows", type=int, default=2**31, help="of the text's beginning; all if not given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    o = parser.parse_args(argv)
    try:
        source = Source(o.model, Options(length=o.length, device=o.device, dtype=o.dtype))
        text = EvalText.read(o.text, source.folder, o.length, o.rows)
        found = compare(source.open(), source.open(Checkpoint(o.result)), text.tokens)
    except UserError as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 2
    print(f"{text.name}: {len(text.tokens)} rows of {o.length} tokens, {text.words or 'no'} words")
    for name, figure in (("dense", found.perplexity_before), ("compressed", found.perplexity_after)):
        word = per_word(figure, found.tokens, text.words)
        print(f"{name:<11}{figure:.3f} per token" + ("" if word is None else f", {word:.3f} per word"))
    print(f"KL {found.kl_divergence:.5f} nats per token, top-1 agreement {found.top1_agreement:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
