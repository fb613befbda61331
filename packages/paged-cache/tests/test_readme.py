import json
import re
import shlex
from pathlib import Path

from paged_cache._src.planning.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys):
    for example in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "(4, 512, 16, 64) [19 22]",
        "0 LayerPlace(group=0, view=0, writes=True) (2, 600, 16, 64)",
        "1 LayerPlace(group=1, view=0, writes=True) (2, 600, 16, 64)",
        "2 LayerPlace(group=3, view=1, writes=True) (1, 600, 16, 128)",
        "3 LayerPlace(group=2, view=0, writes=True) (2, 600, 16, 64)",
        "4 LayerPlace(group=3, view=1, writes=False) (1, 600, 16, 128)",
        "[[4, 5]] 5",
        "40 cached tokens",
        "True [10]",
        "3 [19  4  0  0  0  0  0  0]",
        "128 [2, 4] ('dp', 'tp')",
    ]


def test_the_command_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    gemma_3_12b = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
    }
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps({"text_config": gemma_3_12b}))
    shown = re.search(
        r"```console\n\$ python -m paged_cache (.*?[^\\])\n(.*?)```", README.read_text("utf-8"), re.DOTALL
    )
    assert main(shlex.split(shown[1].replace("\\\n", ""))) == 0
    assert capsys.readouterr().out == shown[2]
