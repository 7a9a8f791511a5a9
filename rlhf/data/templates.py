"""Records into tokens: the one place where a chat template or an EOS is applied.

Every stage goes through `prompt_tokens` and `response_tokens`, so the reward model sees at training what it sees
in PPO: the same prompt tokens, and the same EOS after an answer that was finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from rlhf.data.fields import as_chat
from rlhf.data.records import PromptRecord
from rlhf.errors import DataError, ModelError
from rlhf.types import Message, Prompt

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

Tokenizer = Any
"""A `transformers` tokenizer; importing its class would cost seconds."""

_SHOWN_CHARACTERS = 600
_SHOWN_EXAMPLES = 2
_SHOWN_AROUND = 30  # characters before and after what is at fault
_warned: set[str] = set()


@dataclass
class TokenizedPrompt:
    """A prompt as the model reads it."""

    record: PromptRecord
    tokens: list[int]


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt, *, chat: bool) -> list[int]:
    """The tokens up to where the answer begins.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt: turns go through the chat template, with the opening of the assistant's turn. Without a template
            they become `Role:` paragraphs, which a warning says once. "", the prompt of a plain text (format
            `text`), is the one token that a text starts with: BOS, else the EOS of the text before it.
        chat: a plain text becomes a user turn if there is a template; else it is tokenised as it is.

    Raises:
        DataError: the chat template refuses the turns, nothing is left to answer, or a control token is spelled out
            in the data, where it would end a turn or open one.
        ModelError: the prompt is "", and the tokenizer has neither BOS nor EOS.
    """
    if prompt == "":
        return [_eos(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    for turn in as_chat(prompt):
        _check_no_control_token(tokenizer, turn["content"])
    if isinstance(prompt, str) and not (chat and tokenizer.chat_template):
        tokens = _plain_tokens(tokenizer, prompt)
    elif tokenizer.chat_template:
        tokens = _templated_tokens(tokenizer, as_chat(prompt))
    else:
        tokens = _plain_tokens(tokenizer, _fallback_text(tokenizer, as_chat(prompt)))
    if not tokens:
        raise DataError("a prompt has no tokens", fix="fill it in or remove the row")
    return tokens


def response_tokens(tokenizer: Tokenizer, response: str, *, finished: bool) -> list[int]:
    """The answer's own tokens, its leading white space kept, and EOS if it was `finished` (not cut by a budget).

    A control token spelled out in the text stays text: else data could end an answer in its middle.

    Raises:
        ModelError: `finished`, and the tokenizer has no EOS.
    """
    tokens = list(tokenizer(response, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [*tokens, _eos(tokenizer)] if finished else tokens


def _check_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    """Refuse what the tokenizer would not read as text.

    Raises:
        DataError: names the token and the words around it.
    """
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = max((token for token in control if token in text), key=lambda token: (len(token), token), default=None)
    if found is None:
        return
    at = text.index(found)
    around = text[max(0, at - _SHOWN_AROUND) : at + len(found) + _SHOWN_AROUND]
    fix = "remove it or spell it otherwise; give a dialogue as turns and not as one text with its control tokens"
    raise DataError(f"the prompt with {around!r} contains the control token {found!r}", fix=fix)


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        fix = "set eos_token in its tokenizer_config.json, or use another model"
        raise ModelError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token", fix=fix)
    return tokenizer.eos_token_id


def _templated_tokens(tokenizer: Tokenizer, turns: list[Message]) -> list[int]:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        # transformers 5 answers with a BatchEncoding unless told otherwise.
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
    except TemplateSyntaxError as error:
        name = tokenizer.name_or_path
        raise ModelError(f"the chat template of {name} is not valid: {error}", fix="correct the template") from error
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        fix = "reorder or merge the turns as the template asks; some allow no system turn"
        raise DataError(f"the chat template refuses the turns {roles}: {error}", fix=fix) from error


def _plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """With BOS where the tokenizer wants one, but never with EOS: an answer is to follow."""
    tokens = list(tokenizer(text)["input_ids"])
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens if bare and bare[-1] == tokens[-1] else tokens[:-1]
    return tokens


def _fallback_text(tokenizer: Tokenizer, turns: list[Message]) -> str:
    """`User:` and `Assistant:` paragraphs for a tokenizer without a chat template.

    The answer starts on its own line, because a space at the end would belong to the answer's first token.
    """
    name = str(tokenizer.name_or_path)
    if name not in _warned:
        _warned.add(name)
        log.warning("the tokenizer %r has no chat template; turns become 'User:' and 'Assistant:' paragraphs", name)
    said = [f"{turn['role'].capitalize()}:\n{turn['content']}" for turn in turns]
    return "\n\n".join([*said, "Assistant:\n"])


def check_prompt_lengths(
    records: Iterable[PromptRecord],
    tokenizer: Tokenizer,
    *,
    chat: bool,
    max_tokens: int,
    overlong: Literal["error", "skip"],
) -> list[TokenizedPrompt]:
    """The prompts of at most `max_tokens` tokens. Nothing is ever cut, for a cut template is another prompt.

    Raises:
        DataError: a prompt is longer and `overlong` is error, or none is left; with file, line and length.
    """
    prompts = []
    for record in records:
        tokens = located(record.where, prompt_tokens, tokenizer, record.prompt, chat=chat)
        prompts.append(TokenizedPrompt(record, tokens))
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= max_tokens]
    longer = [prompt for prompt in prompts if len(prompt.tokens) > max_tokens]
    if not longer:
        return fitting
    named = "".join(f"\n  - {p.record.where}: {len(p.tokens)} tokens" for p in longer[:3])
    message = f"{len(longer)} of {len(prompts)} prompts are longer than max_prompt_tokens {max_tokens}"
    if overlong == "error" or not fitting:
        longest = max(len(prompt.tokens) for prompt in longer)
        skip = " or set overlong: skip," if fitting else ""
        fix = f"raise max_prompt_tokens (longest: {longest}),{skip} or shorten these prompts"
        raise DataError(message + named, fix=fix)
    log.warning("%s and were skipped%s", message, named)
    return fitting


def located(where: str, function: Callable[..., list[int]], *args: Any, **kwargs: Any) -> list[int]:
    """`function(...)`, whose DataError is told `where` (file:line) the row stands."""
    try:
        return function(*args, **kwargs)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", fix=error.fix) from error


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary and the special tokens; policy and reward model must agree on it.

    The padding token is left out: it is masked everywhere, and loaders set it as they like.
    """
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    content = [sorted(tokenizer.get_vocab().items()), sorted((name, str(token)) for name, token in special.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def show_examples(
    console: Console,
    tokenizer: Tokenizer,
    title: str,
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]],
) -> None:
    """Print the first two examples as the model sees them, its trained tokens highlighted.

    Args:
        console: where to.
        tokenizer: decodes, control tokens included.
        title: says what is shown, with the detected format.
        examples: tokens, and for each whether it is trained on.
    """
    from rich.text import Text

    console.print(Text(title, style="bold"))
    for tokens, trained in examples[:_SHOWN_EXAMPLES]:
        # A Text is printed as it is, so data with [brackets] cannot pass for markup.
        shown = Text()
        for text, is_trained in _stretches(tokenizer, tokens, trained):
            marked = f"\u27e6{text}\u27e7" if is_trained and not console.color_system else text
            shown.append(marked, style="bold green" if is_trained else "dim")
        marked_too = f", {sum(trained)} of them trained (highlighted)" if any(trained) else ""
        console.print(Text(f"{len(tokens)} tokens{marked_too}:", style="italic"))
        console.print(_shortened(shown))


def show_prompts(console: Console, tokenizer: Tokenizer, title: str, prompts: Sequence[TokenizedPrompt]) -> None:
    """Print the first two prompts as the model sees them; `title` is like "prompts.train.jsonl: format prompt"."""
    tokens = [prompt.tokens for prompt in prompts[:_SHOWN_EXAMPLES]]
    show_examples(console, tokenizer, title, [(row, [False] * len(row)) for row in tokens])


def _stretches(tokenizer: Tokenizer, tokens: Sequence[int], trained: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    for is_trained, group in groupby(zip(tokens, trained, strict=True), key=lambda pair: bool(pair[1])):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        yield _printable(text), is_trained


def _printable(text: str) -> str:
    """Control characters, which could steer the terminal, are shown as a box."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _shortened(text: Any) -> Any:
    left_out = len(text) - _SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    from rich.text import Text

    half = _SHOWN_CHARACTERS // 2
    return text[:half] + Text(f" ... {left_out} characters ... ", style="yellow") + text[-half:]
