"""EasyDeL's names (2025) for an attention operator and its registry: a thin adapter beside `attend`."""
