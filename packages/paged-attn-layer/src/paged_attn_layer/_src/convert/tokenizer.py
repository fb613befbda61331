"""The tokenizer that comes with a checkpoint, without torch and without the network."""

import os
import pathlib
from typing import TYPE_CHECKING

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.source import require_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory or a GGUF file, chat template included.

    Raises:
        ValueError: nothing is there, the file is broken, or there is no tokenizer in it.
        NotImplementedError: the GGUF file's tokenizer is of a kind that is not supported; names it.
        ModuleNotFoundError: transformers or gguf is not installed; says what to install.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a Hugging Face model directory or a .gguf file")
    if not path.is_dir():
        with needs_extra("hf"):
            from paged_attn_layer._src.convert.gguf_tokenizer import gguf_tokenizer  # noqa: PLC0415
        return gguf_tokenizer(path)
    if not any((path / name).exists() for name in _FILES):
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(_FILES)}; download the model's own there")
    for entry in path.iterdir():
        if entry.exists() and not entry.is_dir():
            require_file(entry, "download it again")
    with needs_extra("hf"):
        # transformers takes seconds to import, and here imports torch too where that is installed.
        from transformers import AutoTokenizer  # noqa: PLC0415
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a"))  # some settings of a wrong type show in the first use only
        return tokenizer
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions, transformers those of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path} has a tokenizer that cannot be read ({reason}); download it again") from error
