import io
import json
import os
import signal
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paged_attn_layer._src.cli import build_parser, main, read_prompts
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.progress import ServingBar
from paged_attn_layer._src.engine.text import OutputText

WORDS = ["red", "green", "blue", "one", "two", "three", "<end>"]
SIZES = ["--max-sequence-length", "32", "--max-seqs", "2", "--page-size", "4", "--prefill-chunk", "8"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A Llama of one layer with random weights, as Hugging Face saves them."""
    path = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    shapes = {
        "embed_tokens": (len(WORDS), 8),
        "layers.0.self_attn.q_proj": (8, 8),
        "layers.0.self_attn.k_proj": (4, 8),
        "layers.0.self_attn.v_proj": (4, 8),
        "layers.0.self_attn.o_proj": (8, 8),
        "layers.0.mlp.gate_proj": (12, 8),
        "layers.0.mlp.up_proj": (12, 8),
        "layers.0.mlp.down_proj": (8, 12),
        "layers.0.input_layernorm": (8,),
        "layers.0.post_attention_layernorm": (8,),
        "norm": (8,),
    }
    rng = np.random.default_rng(0)
    weights = {f"model.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    def write(text):
        path = tmp_path / "prompts.txt"
        path.write_text(text)
        return str(path)

    return write


def test_help_suffices(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for word in ("--model", "--prompts", "--num-pages", "arrival", "examples:", "default: 16"):
        assert word in shown


def test_answers_summary_picture_and_json(model_dir, prompts, tmp_path, capsys, monkeypatch):
    loaded, load = [], Engine.load
    monkeypatch.setattr(Engine, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[0])
    path = prompts('red green\n\n{"prompt": "one two three", "arrival": 2}\n')
    picture, answers = tmp_path / "run.png", tmp_path / "run.json"
    options = ["--max-new-tokens", "5", "--kv-dtype", "int8", "--plot", str(picture), "--json", str(answers), *SIZES]
    assert main(["--model", str(model_dir), "--prompts", path, *options]) == 0
    assert loaded[0].config.kv_dtype == "int8"
    shown = capsys.readouterr()
    assert str(picture) in shown.out
    assert "after warm-up, which compiled 7" in shown.out  # three shapes of steps, copies of 1 and 2 pages, samplers
    assert "serving" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(answers.read_text())
    assert [answer["line"] for answer in found["answers"]] == [1, 3]
    assert all(1 <= len(answer["token_ids"]) <= 5 for answer in found["answers"])
    assert found["steps"][0]["mode"] == "prefill"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompts; write one prompt per line"),
        ("red\n{not json}\n", "line 2 starts with { but is not JSON"),
        (
            '{"prompts": "red"}\n',
            'line 1 must be like {"prompt": "text", "arrival": 0}, with nothing else; it has prompts',
        ),
        ('{"prompt": 3}\n', "line 1 must be like"),
        ('{"prompt": "red", "arrival": true}\n', "line 1 has arrival=True; it must be a step number"),
        ('red\n\n{"prompt": "red", "arrival": -1}\n', "line 3 has arrival=-1; it must be a step number, at least 0"),
        ("red\n" + "red " * 30 + "\n", "line 2: prompt of 30 tokens + max_new_tokens=5 = 35 must be at most"),
    ],
)
def test_bad_prompts_are_one_line_and_exit_code_2(model_dir, prompts, capsys, text, says):
    assert main(["--model", str(model_dir), "--prompts", prompts(text), "--max-new-tokens", "5", *SIZES]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("paged-generate: ")
    assert says in error


def test_a_missing_prompts_file_is_one_line(model_dir, capsys):
    assert main(["--model", str(model_dir), "--prompts", "nowhere.txt"]) == 2
    message = "paged-generate: nowhere.txt does not exist; give a file with one prompt per line\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "the following arguments are required: --model, --prompts"),
        (["--model", "m", "--prompts", "p", "--page-size", "big"], "argument --page-size: invalid int value: 'big'"),
        (["--model", "m", "--prompts", "p", "--beams", "4"], "unrecognized arguments: --beams 4"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(capsys, options, says):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert capsys.readouterr().err == f"paged-generate: {says}; see paged-generate --help\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no room"), 2, "this machine cannot run it (no room); try a smaller --num-pages"),
    ],
)
def test_what_happens_while_it_runs_is_one_line_too(monkeypatch, prompts, capsys, error, code, says):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("paged_attn_layer._src.cli.Engine.load", load)
    assert main(["--model", "m", "--prompts", prompts("red\n")]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"paged-generate: {says}")


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("--plot", "run.xyz", "run.xyz must end in one of ."),
        ("--plot", "run", "run must end in one of ."),
        ("--plot", "", "it is a directory; name a file in it"),
        ("--json", "", "it is a directory; name a file in it"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_first(prompts, tmp_path, capsys, option, name, says):
    assert main(["--model", "nowhere", "--prompts", prompts("red\n"), option, str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_picture_that_cannot_be_written_is_told_before_the_model_is_loaded(prompts, capsys):
    assert main(["--model", "nowhere", "--prompts", prompts("red\n"), "--plot", "no/such/run.png"]) == 2
    assert "no/such/run.png cannot be written: no/such is not a directory" in capsys.readouterr().err


def test_a_missing_model_is_one_line(prompts, capsys):
    assert main(["--model", "nowhere", "--prompts", prompts("red\n")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_architecture_is_one_line(tmp_path, prompts, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["--model", str(tmp_path), "--prompts", prompts("red\n")]) == 2
    assert "architecture 'MambaForCausalLM' is not supported" in capsys.readouterr().err.splitlines()[-1]


def test_a_size_that_means_nothing_is_one_line(model_dir, prompts, capsys):
    assert main(["--model", str(model_dir), "--prompts", prompts("red\n"), "--page-size", "0"]) == 2
    assert "page_size=0 must be at least 1" in capsys.readouterr().err


def test_only_line_feeds_separate_prompts_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes("\ufeffone\u2028still one\r\n\x1ctwo\x0cstill\rtwo\n \t \r\n\x85three\x0b\n".encode())
    lines = [(line.number, line.prompt) for line in read_prompts(path)]
    assert lines == [(1, "one\u2028still one"), (2, "\x1ctwo\x0cstill\rtwo"), (4, "\x85three\x0b")]
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "red", "arrival": 2}\r\n')
    assert [(line.prompt, line.arrival) for line in read_prompts(path)] == [("red", 2)]


@pytest.mark.parametrize("line", ['{"a":' * 100_000, '{"prompt": "red", "arrival": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_read_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "prompts"
    path.write_text("red\n" + line)
    with pytest.raises(ValueError, match=r"line 2 starts with \{ but is not JSON"):
        read_prompts(path)


def test_half_of_a_surrogate_pair_is_named_by_its_line(model_dir, prompts, capsys):
    path = prompts('red\n{"prompt": "red \\ud800"}\n')
    assert main(["--model", str(model_dir), "--prompts", path, "--max-new-tokens", "5", *SIZES]) == 2
    assert "line 2: prompt has half of a surrogate pair at character 4" in capsys.readouterr().err.splitlines()[-1]


def test_a_prompts_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(path)


TWO_PROMPTS = 'red green\n{"prompt": "one two", "arrival": 40}\n'


def test_ctrl_c_keeps_what_is_finished(model_dir, prompts, tmp_path, capsys, monkeypatch):
    update, answers = ServingBar.update, tmp_path / "run.json"

    def interrupt(bar, step, finished):
        update(bar, step, finished)
        if finished:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ServingBar, "update", interrupt)
    options = ["--max-new-tokens", "5", "--json", str(answers), "--plot", str(tmp_path / "run.png"), *SIZES]
    assert main(["--model", str(model_dir), "--prompts", prompts(TWO_PROMPTS), *options]) == 130
    shown = capsys.readouterr()
    assert "red green" in shown.out
    assert "one two" not in shown.out
    assert shown.err.splitlines()[-2:] == [
        "paged-generate: 1 of 2 answers are finished, and are kept",
        "paged-generate: interrupted",
    ]
    (answer,) = json.loads(answers.read_text())["answers"]
    assert (answer["line"], answer["finish_reason"]) != (2, "aborted")
    assert (tmp_path / "run.png").stat().st_size


def test_ctrl_c_before_the_first_answer_keeps_the_figures(model_dir, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ServingBar, "update", lambda *_: signal.raise_signal(signal.SIGINT))
    options = ["--json", str(tmp_path / "run.json"), "--max-new-tokens", "5", *SIZES]
    assert main(["--model", str(model_dir), "--prompts", prompts("red\n"), *options]) == 130
    assert json.loads((tmp_path / "run.json").read_text())["answers"] == []
    assert "0 of 1 answers are finished" in capsys.readouterr().err


def test_an_answer_that_cannot_be_decoded_is_told_and_the_others_are_kept(model_dir, prompts, capsys, monkeypatch):
    push, pushed = OutputText.push, []

    def fail_once(text, token_id):
        pushed.append(text)
        if text is pushed[0]:
            raise LookupError("no such token")
        return push(text, token_id)

    monkeypatch.setattr(OutputText, "push", fail_once)
    path = prompts("red green\none two\n")
    assert main(["--model", str(model_dir), "--prompts", path, "--max-new-tokens", "5", *SIZES]) == 2
    shown = capsys.readouterr()
    assert "1 answers could not be turned into text: line 1: LookupError: no such token" in shown.err.splitlines()[-1]
    assert "one two" in shown.out


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")


@needs_full
def test_a_full_disk_is_told_before_the_model_is_loaded(prompts, tmp_path, capsys, monkeypatch):
    path = prompts("red\n")
    assert main(["--model", "nowhere", "--prompts", path, "--json", "/dev/full"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "paged-generate: /dev/full cannot be written: No space left on device"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["--model", "nowhere", "--prompts", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "paged-generate: standard output cannot be written: No space left on device"


def test_a_closed_standard_output_is_told_before_the_model_is_loaded(prompts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--model", "nowhere", "--prompts", prompts("red\n")]) == 2
    assert "standard output is closed" in capsys.readouterr().err


def test_the_check_of_an_output_leaves_the_file_as_it_is(prompts, tmp_path, capsys):
    kept, new, link = tmp_path / "kept.json", tmp_path / "new.json", tmp_path / "link.json"
    kept.write_text("kept")
    link.symlink_to(tmp_path / "target.json")
    for path in (kept, new, link):
        assert main(["--model", "nowhere", "--prompts", prompts("red\n"), "--json", str(path)]) == 2
        assert "nowhere does not exist" in capsys.readouterr().err
    assert kept.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["kept.json", "link.json", "prompts.txt"]


@pytest.mark.parametrize(
    "options",
    [["--plot", "{0}/a.png", "--json", "{0}/b/../a.png"], ["--json", "{0}/prompts.txt"], ["--json", "{0}/hard"]],
)
def test_two_options_of_one_path_are_refused(prompts, tmp_path, capsys, options):
    (tmp_path / "b").mkdir()
    path = prompts("red\n")
    os.link(path, tmp_path / "hard")
    assert main(["--model", "nowhere", "--prompts", path, *[option.format(tmp_path) for option in options]]) == 2
    assert "are one file" in capsys.readouterr().err
    assert (tmp_path / "prompts.txt").read_text() == "red\n"


def test_no_file_of_the_model_is_overwritten(model_dir, prompts, capsys):
    config = model_dir / "config.json"
    before = config.read_text()
    assert main(["--model", str(model_dir), "--prompts", prompts("red\n"), "--json", str(config)]) == 2
    assert "config.json is a file of --model" in capsys.readouterr().err
    assert config.read_text() == before


def test_a_directory_in_the_place_of_prompts(model_dir, capsys):
    assert main(["--model", str(model_dir), "--prompts", str(model_dir)]) == 2
    assert "is a directory; give a file with one prompt per line" in capsys.readouterr().err


def test_a_disk_that_fills_up_later_costs_no_other_output(model_dir, prompts, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paged_attn_layer._src.cli._print_summary", full)
    monkeypatch.setattr("paged_attn_layer._src.cli.plot", full)
    options = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png"), "--max-new-tokens", "3"]
    assert main(["--model", str(model_dir), "--prompts", prompts("red\n"), *options, *SIZES]) == 2
    assert len(json.loads((tmp_path / "run.json").read_text())["answers"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].count("No space left on device") == 2


def test_an_ascii_locale_loses_no_answer(model_dir, prompts, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    path = prompts("red \u4e2d\u6587\n")
    assert main(["--model", str(model_dir), "--prompts", path, "--max-new-tokens", "3", *SIZES]) == 0
    assert rb"red \u4e2d\u6587" in shown.getvalue()
    assert b"after warm-up" in shown.getvalue()


def test_a_stop_string_is_utf_8_where_the_locale_is_ascii():
    as_ascii = "\u4e2d".encode().decode("ascii", "surrogateescape")
    args = build_parser().parse_args(["--model", "m", "--prompts", "p", "--stop", as_ascii, "\u4e2d", "end"])
    assert args.stop == ["\u4e2d", "\u4e2d", "end"]
