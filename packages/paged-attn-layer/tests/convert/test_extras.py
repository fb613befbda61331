import sys

import pytest

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.tokenizer import load_tokenizer


def test_what_to_install_is_said(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "paged_attn_layer._src.convert.gguf_tokenizer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ModuleNotFoundError, match=r"transformers is not installed; pip install 'paged-attn-layer\[hf\]'"
    ):
        load_tokenizer(tmp_path / "model.gguf")


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), needs_extra("hf"):
        1 / 0  # noqa: B018
