import re
from pathlib import Path


def test_the_examples_run(capsys):
    readme = Path(__file__).parents[1] / "README.md"
    for example in re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(example, str(readme), "exec"), {})
    assert capsys.readouterr().out == "(4, 512, 16, 64) [19 20]\n16 tokens found\n"
