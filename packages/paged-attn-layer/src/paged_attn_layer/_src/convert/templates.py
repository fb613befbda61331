"""Templates of weight names, such as `"layers.{layer}.attention.{q|k|v}_proj.kernel"`.

A placeholder in braces stands for an integer (`{layer}`), for one of some words (`{q|k|v}`), or for any text (`{...}`).
"""

import functools
import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def placeholders(*templates: str) -> frozenset[str]:
    """The placeholders of the templates, without braces."""
    return frozenset(name for template in templates for name in _PLACEHOLDER.findall(template))


def parse(template: str, name: str) -> dict[str, str] | None:
    """What each placeholder stands for in `name`; `None` if the name does not fit the template.

    >>> parse("layers.{layer}.{q|k}_proj", "layers.10.k_proj")
    {'layer': '10', 'q|k': 'k'}
    """
    found = _pattern(template).fullmatch(name)
    return None if found is None else dict(zip(_in_order(template), found.groups(), strict=True))


def fill(template: str, values: Mapping[str, str], index: int = 0) -> str:
    """The name with the placeholders' values in it; a placeholder without a value becomes `index`.

    >>> fill("layers.{layer}.experts.{expert}", {"layer": "10"}, index=3)
    'layers.10.experts.3'
    """
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], str(index)), template)


def _in_order(template: str) -> list[str]:
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression with one group for each placeholder; where one comes again, it must be the same text."""
    pattern, seen = "", []
    for index, part in enumerate(_PLACEHOLDER.split(template)):
        if index % 2 == 0:
            pattern += re.escape(part)
        elif part in seen:
            pattern += rf"(?:\{seen.index(part) + 1})"
        else:
            seen.append(part)
            pattern += r"(.+)" if part == "..." else f"({part})" if "|" in part else r"(\d+)"
    return re.compile(pattern)
