"""The README's table of model families, made of the registry and of the cases that are compared with transformers.

python integration_tests/support/model_table.py
"""

from types import ModuleType

from family_cases import CASES

from paged_attn_layer import Family
from paged_attn_layer._src.models import registry


def make_table() -> str:
    """The table, one row for each family."""
    rows = ["| architectures | what they are | compared with transformers | GGUF |", "| --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, registry.FAMILIES)])


def untested_types() -> list[str]:
    """The model types of families that no case compares with transformers."""
    tested = {case.model_type for case in CASES}
    return [name for family in registry.FAMILIES for name in family.model_types if name not in tested]


def _row(family: Family) -> str:
    names = ", ".join(f"`{name}`" for name in family.architectures)
    gguf = f"`{family.gguf.architecture}`" if family.gguf else ""
    return f"| {names} | {_what(_module(family))} | {_models(family)} | {gguf} |"


def _what(module: ModuleType) -> str:
    """The first line of the family's file: `The Qwen2 family: its form.` gives `Qwen2: its form`."""
    first, *_ = (module.__doc__ or "").splitlines()
    return first.removeprefix("The ").removesuffix(".").replace(" family", "", 1)


def _models(family: Family) -> str:
    """The small models that are compared: `plain`, and the names of variants."""
    cases = [case for case in CASES if case.model_type in family.model_types]
    return ", ".join(name for case in cases for name in ("plain", *case.variants))


def _module(family: Family) -> ModuleType:
    modules = (value for value in vars(registry).values() if isinstance(value, ModuleType))
    return next(module for module in modules if getattr(module, "FAMILY", None) is family)


if __name__ == "__main__":
    print(make_table())
