"""A tokenizer that raises ends the answers that it cannot give, and no others."""

import pytest
from tiny_models import EveryKind, dense_answer

from paged_attn_layer import Completion, Engine, EngineConfig

NEW_TOKENS = 6
PROMPTS = [[1, 2, 3], [9, 8], [5]]


class Fragile:
    """Letters; it raises for texts that hold a given token."""

    eos_token_id = None
    chat_template = None
    poison: int | None = None

    def encode(self, text):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, token_ids, *, skip_special_tokens):
        if self.poison in token_ids:
            raise LookupError(f"no token {self.poison}")
        return "".join(chr(ord("A") + i) for i in token_ids)


@pytest.fixture(scope="module")
def expected():
    model = EveryKind()
    return [dense_answer(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.fixture
def engine():
    config = EngineConfig(max_seqs=3, max_sequence_length=20, page_size=4, prefill_chunk=8)
    return Engine(EveryKind(), tokenizer=Fragile(), config=config)


def test_a_tokenizer_that_raises_ends_that_request_alone(engine, expected):
    (poison, *_) = [token for token in expected[0] if token not in expected[1] + expected[2]]
    engine.tokenizer.poison = poison
    failed, *others = engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    until = expected[0].index(poison)
    assert failed == Completion(
        text="".join(chr(ord("A") + i) for i in expected[0][:until]),
        token_ids=expected[0][: until + 1],
        finish_reason="error",
        prompt_tokens=3,
        error=f"LookupError: no token {poison}",
    )
    assert [answer.token_ids for answer in others] == expected[1:]
    assert [answer.finish_reason for answer in others] == ["length", "length"]
    assert [answer.text for answer in others] == ["".join(chr(65 + i) for i in ids) for ids in expected[1:]]
    assert [answer.error for answer in others] == [None, None]
    assert not engine.has_work
    assert engine.pages_used == 0


def test_a_tokenizer_that_raises_only_for_the_whole_text_ends_it_too(engine, monkeypatch):
    request, other = (engine.request([1], max_new_tokens=2) for _ in range(2))

    def value(text):
        if text is request.text:
            raise LookupError("late")
        return "fine"

    monkeypatch.setattr(type(request.text), "value", property(value))
    completions = engine.serve([request, other])
    assert [(each.finish_reason, each.error) for each in completions] == [
        ("error", "LookupError: late"),
        ("length", None),
    ]
    assert completions[1].text == "fine"


def test_a_request_that_has_not_finished_has_no_completion(engine):
    with pytest.raises(ValueError, match=r"has not finished; call Engine.step until it has"):
        Completion.of(engine.request([1], max_new_tokens=1))
