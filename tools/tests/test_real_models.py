import importlib

import pytest
import real_models


@pytest.mark.parametrize("find", [real_models.smollm2_path, lambda: real_models.gemma3_path(None)])
def test_a_model_that_is_not_installed(monkeypatch, find):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert find() is None


def test_smollm2_is_found_without_an_import(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(real_models, "SMOLLM2", "some_model")
    assert real_models.smollm2_path() == package / "model.gguf"


def test_the_parts_of_gemma_3_are_joined_in_a_directory(tmp_path, monkeypatch):
    (tmp_path / "some_parts.py").write_text("MODEL_NAME = 'model.gguf'\nassemble = lambda path: path\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(real_models, "GEMMA3", "some_parts")
    assert real_models.gemma3_path(tmp_path / "build") == tmp_path / "build" / "model.gguf"
