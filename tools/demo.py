"""The program of `nox -s demo`: a real model answers prompts from a paged KV cache, on the CPU.

`--model smollm2` (the default) is SmolLM2-135M-Instruct, `--model gemma3` Gemma 3 270M. Both are GGUF files in PyPI
packages. The rest is the command `paged-generate`. Other options are passed to it, and replace the options below.
"""

import argparse
import sys
from pathlib import Path

from real_models import gemma3_path, smollm2_path

from paged_attn_layer._src.cli import main

TOOLS, BUILD = Path(__file__).parent, Path(__file__).parents[1] / "build"
GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def demo_options(model: str) -> list[str]:
    """Returns the options of `paged-generate`. Gemma 3 270M is a base model: it continues texts, and knows no chat."""
    if model == "gemma3":
        print(GEMMA_TERMS, file=sys.stderr)
        path, prompts, new_tokens = gemma3_path(BUILD), "demo_texts.jsonl", 32
    else:
        path, prompts, new_tokens = smollm2_path(), "demo_prompts.jsonl", 48
    if path is None:
        sys.exit(f"the model is not installed; run `nox -s demo -- --model {model}`")
    options = {"--model": path, "--prompts": TOOLS / prompts, "--max-new-tokens": new_tokens}
    return [str(part) for option in options.items() for part in option]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2")
    chosen, others = parser.parse_known_args()
    BUILD.mkdir(exist_ok=True)
    sys.exit(main([*demo_options(chosen.model), "--plot", str(BUILD / "demo.png"), *others]))
