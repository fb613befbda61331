"""Checkpoints on disk to models in memory."""

from paged_attn_layer._src.convert.load import load_model, open_checkpoint
from paged_attn_layer._src.convert.source import ConversionError, WeightSource
from paged_attn_layer._src.convert.tokenizer import load_tokenizer

__all__ = ["ConversionError", "WeightSource", "load_model", "load_tokenizer", "open_checkpoint"]
