"""Turns a prompt into token ids: a text, or the messages of a chat."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_attn_layer._src.engine import checks
from paged_attn_layer._src.engine.text import Tokenizer, special_text

Message = Mapping[str, Any]
"""One message of a chat, such as `{"role": "user", "content": "Name three rivers."}`."""

_CONTENT = "\ue000"  # of a private use area, so that no chat template has it


def is_chat(prompt: object) -> bool:
    """True if the prompt is a list of messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], chat: bool | None = None) -> list[int]:
    """Returns the token ids of messages in the tokenizer's chat template, up to the start of the answer.

    Raises:
        ValueError: there is no chat template, or it is not to be used, or it refuses the messages; or one has no role.
    """
    if chat is False:
        raise ValueError("messages need the chat template, so chat must not be False; give a text instead")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which messages need; give a text instead")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {index} of the prompt is {message!r}; it must be like {{"role": "user", ...}}')
        for text in _texts(message):
            checks.text(f"message {index} of the prompt", text)
    return _in_template(tokenizer, messages, tokenize=True)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def encode_text(tokenizer: Tokenizer, prompt: str, chat: bool | None) -> list[int]:
    """Returns the token ids of a text.

    A text that the chat template has rendered already, such as `"<s>[INST] Hi [/INST]"`, gets no second template, and
    no text gets the token that starts texts twice.

    Args:
        tokenizer: its encoder and chat template are used.
        prompt: the text.
        chat: if true, put the prompt into the chat template, as the user's turn. `None`: if there is a template, and
            the text is not rendered already.

    Raises:
        ValueError: the prompt is empty, `chat` is true and there is no chat template, or the template refuses it.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; it must have some text")
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use chat=False (--no-chat)")
    turn = {"role": "user", "content": prompt}
    if chat:
        return encode_chat(tokenizer, [turn])
    start = tokenizer.encode("")[:1]
    if chat is None and tokenizer.chat_template:
        rendered = _encode_rendered(tokenizer, prompt, start)
        return encode_chat(tokenizer, [turn]) if rendered is None else rendered
    ids = tokenizer.encode(prompt)
    return ids[1:] if start and ids[:2] == start * 2 else ids


def _encode_rendered(tokenizer: Tokenizer, prompt: str, start: list[int]) -> list[int] | None:
    """The token ids of a text that the chat template has rendered; `None` if it has not.

    Such a text starts with a special token, or as the template does. The token that starts texts may have been cut off.
    """
    special = special_text(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    opening = _in_template(tokenizer, [{"role": "user", "content": _CONTENT}], tokenize=False).partition(_CONTENT)[0]
    start_text = special(start[0]) if start else ""
    has_start = bool(start_text) and opening.startswith(start_text)
    opening = opening.removeprefix(start_text)
    if not (ids and special(ids[0])) and not (opening.strip() and prompt.startswith(opening)):
        return None
    return start + ids if has_start and ids[:1] != start else ids


def _in_template(tokenizer: Tokenizer, messages: Sequence[Message], *, tokenize: bool) -> Any:
    """The messages in the chat template: token ids or text."""
    turns = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=tokenize, return_dict=False)
    except Exception as error:  # what a template raises is up to its author
        raise ValueError(f"the chat template refuses the prompt: {error}") from error
