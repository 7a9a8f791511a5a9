"""Templates against a word-level tokenizer whose tokens can be read off, with pad == eos as SmolLM2 has it."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from rlhf.data import templates
from rlhf.data.records import PromptRecord
from rlhf.data.templates import (
    TokenizedPrompt,
    check_prompt_lengths,
    prompt_tokens,
    response_tokens,
    show_examples,
    show_prompts,
    tokenizer_fingerprint,
)
from rlhf.errors import DataError, ModelError

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "user",
    "assistant",
    "system",
    "hi",
    "why",
    "blue",
    "User",
    "Assistant",
    ":",
    "\n",
    " ",
]
WORDS += ["\n\n", "[red]", "</", "s", ">", "\x1b"]
TEMPLATE = (
    "{% if messages[0].role == 'system' and messages | length == 1 %}{{ raise_exception('no user turn') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def build(template: str | None = TEMPLATE, *, bos: bool = False, eos: bool = False, words: list[str] = WORDS) -> Any:
    """A tokenizer; `bos` and `eos`: plain text gets them by itself."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pieces = Regex(r"\[red\]|\n\n|</|\s|:|>|[^\s:>]+")
    raw.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
    )


def words(tokenizer: Any, tokens: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokens)


def record(content: str, line: int = 1) -> PromptRecord:
    return PromptRecord([{"role": "user", "content": content}], "id", where=f"d.jsonl:{line}")


# --- prompts --------------------------------------------------------------------------------------------------


def test_turns_go_through_the_chat_template_and_open_the_answer() -> None:
    tokenizer = build()
    tokens = prompt_tokens(tokenizer, USER, chat=True)
    assert type(tokens) is list
    assert words(tokenizer, tokens) == ["<s>", "user", ":", "hi", "</s>", "assistant", ":"]


def test_the_template_brings_the_only_bos() -> None:
    tokenizer = build(bos=True)
    assert words(tokenizer, prompt_tokens(tokenizer, USER, chat=True)).count("<s>") == 1


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (TEMPLATE, True, ["<s>", "user", ":", "hi", "</s>", "assistant", ":"]),
        (TEMPLATE, False, ["hi"]),
        (None, True, ["hi"]),
        (None, False, ["hi"]),
    ],
)
def test_a_plain_text_is_a_user_turn_only_on_wish_and_with_a_template(
    template: str | None, chat: bool, expected: list[str]
) -> None:
    tokenizer = build(template)
    assert words(tokenizer, prompt_tokens(tokenizer, "hi", chat=chat)) == expected


def test_a_plain_text_gets_bos_but_never_eos() -> None:
    tokenizer = build(None, bos=True, eos=True)
    assert words(tokenizer, prompt_tokens(tokenizer, "hi why", chat=False)) == ["<s>", "hi", " ", "why"]


@pytest.mark.parametrize(("template", "chat"), [(TEMPLATE, True), (TEMPLATE, False), (None, True), (None, False)])
@pytest.mark.parametrize(
    "prompt",
    [
        "hi</s>",
        [{"role": "user", "content": "hi </s> why"}],
        [{"role": "system", "content": "</s>"}, {"role": "user", "content": "hi"}],
        [*USER, {"role": "assistant", "content": "x</s>"}, *USER],
    ],
)
def test_a_control_token_spelled_out_in_the_data_is_refused(template: str | None, chat: bool, prompt: Any) -> None:
    """Tokenised, it would end a turn, or open one that nobody wrote."""
    with pytest.raises(DataError, match="contains the control token '</s>'") as caught:
        prompt_tokens(build(template), prompt, chat=chat)
    assert "remove it" in caught.value.fix


def test_a_refused_control_token_names_the_longest_match_the_text_around_it_and_the_line() -> None:
    tokenizer = build()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>", "<|im|>x"]})
    bad = record("why is it <|im|>x blue", 7)
    with pytest.raises(DataError, match=r"d\.jsonl:7: .*'why is it <\|im\|>x blue'.* the control token '<\|im\|>x'"):
        check_prompt_lengths([record("hi"), bad], tokenizer, chat=True, max_tokens=50, overlong="skip")


def test_an_added_token_that_controls_nothing_is_text() -> None:
    tokenizer = build()
    tokenizer.add_tokens(["<think>"])
    assert "<think>" in words(tokenizer, prompt_tokens(tokenizer, "hi <think> why", chat=True))


# --- plain text: no prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "chat"), [(TEMPLATE, True), (TEMPLATE, False), (None, True), (None, False)])
def test_the_prompt_of_a_plain_text_is_bos(template: str | None, chat: bool) -> None:
    for bos in (True, False):
        assert words(build(template, bos=bos), prompt_tokens(build(template, bos=bos), "", chat=chat)) == ["<s>"]


def test_without_bos_a_plain_text_starts_after_eos() -> None:
    tokenizer = build()
    tokenizer.bos_token = None
    assert words(tokenizer, prompt_tokens(tokenizer, "", chat=True)) == ["</s>"]
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        prompt_tokens(tokenizer, "", chat=True)


def test_turns_without_a_template_become_paragraphs_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_warned", set())
    tokenizer = build(None)
    with caplog.at_level(logging.WARNING):
        tokens = prompt_tokens(tokenizer, USER, chat=True)
        prompt_tokens(tokenizer, USER, chat=True)
    expected = ["User", ":", "\n", "hi", "\n\n", "Assistant", ":", "\n"]
    assert words(tokenizer, tokens) == expected
    assert caplog.text.count("no chat template") == 1


def test_a_refusing_template_is_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses the turns system: no user turn"):
        prompt_tokens(build(), [{"role": "system", "content": "hi"}], chat=True)


def test_a_prompt_without_tokens_is_a_data_error(tiny: Any) -> None:
    with pytest.raises(DataError, match="no tokens"):
        prompt_tokens(tiny.tokenizer, " ", chat=False)  # a tokenizer that drops white space


# --- responses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finished", "end"), [(True, ["</s>"]), (False, [])])
def test_a_finished_answer_ends_with_eos_and_keeps_its_leading_space(finished: bool, end: list[str]) -> None:
    tokenizer = build(bos=True, eos=True)
    tokens = response_tokens(tokenizer, " blue", finished=finished)
    assert words(tokenizer, tokens) == [" ", "blue", *end]


def test_an_empty_finished_answer_is_eos_alone() -> None:
    assert response_tokens(build(), "", finished=True) == [2]


def test_an_eos_spelled_out_in_an_answer_does_not_end_it() -> None:
    tokenizer = build()
    tokens = response_tokens(tokenizer, "hi</s>blue", finished=True)
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokens[-1] == tokenizer.eos_token_id
    assert prompt_tokens(tokenizer, USER, chat=True).count(tokenizer.eos_token_id) == 1  # and the template's still does


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = build()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        response_tokens(tokenizer, "hi", finished=True)
    assert words(tokenizer, response_tokens(tokenizer, "hi", finished=False)) == ["hi"]


# --- lengths --------------------------------------------------------------------------------------------------


def test_a_prompt_of_exactly_the_limit_fits() -> None:
    (prompt,) = check_prompt_lengths([record("hi")], build(), chat=True, max_tokens=7, overlong="error")
    assert len(prompt.tokens) == 7
    assert prompt.record == record("hi")


def test_an_overlong_prompt_names_file_line_length_limit_and_fix() -> None:
    records = [record("hi"), record("hi why", 2)]
    with pytest.raises(DataError) as caught:
        check_prompt_lengths(records, build(), chat=True, max_tokens=8, overlong="error")
    for part in ("1 of 2", "d.jsonl:2: 9 tokens", "max_prompt_tokens 8", "longest: 9", "overlong: skip"):
        assert part in str(caught.value)


def test_overlong_prompts_are_skipped_whole_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    records = [record("hi why"), record("hi", 2)]
    with caplog.at_level(logging.WARNING):
        (prompt,) = check_prompt_lengths(records, build(), chat=True, max_tokens=7, overlong="skip")
    assert prompt.record.where == "d.jsonl:2"
    assert "1 of 2 prompts are longer than max_prompt_tokens 7 and were skipped" in caplog.text


def test_skipping_every_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="1 of 1"):
        check_prompt_lengths([record("hi")], build(), chat=True, max_tokens=3, overlong="skip")


def test_a_refused_prompt_names_its_line() -> None:
    bad = PromptRecord([{"role": "system", "content": "hi"}], "id", where="d.jsonl:9")
    with pytest.raises(DataError, match=r"d\.jsonl:9: the chat template refuses"):
        check_prompt_lengths([bad], build(), chat=True, max_tokens=9, overlong="error")


# --- fingerprint ----------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_vocabulary_and_special_tokens_but_not_on_padding() -> None:
    expected = tokenizer_fingerprint(build())
    assert len(expected) == 64
    assert tokenizer_fingerprint(build(None)) == expected
    padded = build()
    padded.pad_token = "<unk>"
    assert tokenizer_fingerprint(padded) == expected
    assert tokenizer_fingerprint(build(words=[*WORDS, "new"])) != expected
    assert tokenizer_fingerprint(build(words=[*WORDS[:6], "why", "hi", *WORDS[8:]])) != expected
    other = build()
    other.eos_token = "blue"
    assert tokenizer_fingerprint(other) != expected


# --- examples -------------------------------------------------------------------------------------------------


def shown(examples: list[tuple[list[int], list[bool]]], *, color: bool = False) -> str:
    out = io.StringIO()
    system = "truecolor" if color else None
    console = Console(file=out, width=2000, force_terminal=color, color_system=system)
    show_examples(console, build(), "sft data: format messages", examples)
    return out.getvalue()


def test_trained_tokens_are_marked_and_markup_is_not_obeyed() -> None:
    tokens = [6, WORDS.index("[red]"), 8, 2]
    text = shown([(tokens, [False, False, True, True])])
    assert text.startswith("sft data: format messages\n4 tokens, 2 of them trained")
    assert "[red]" in text
    assert text.rstrip().endswith("\u27e7")
    marked = text[text.index("\u27e6") + 1 : text.index("\u27e7")]
    assert marked.split() == ["blue", "</s>"] or marked == "blue</s>"


def test_prompts_are_shown_with_their_control_tokens_and_nothing_is_marked() -> None:
    out = io.StringIO()
    tokenizer = build()
    records = [record(content) for content in ("hi", "why", "blue")]
    prompts = [TokenizedPrompt(r, prompt_tokens(tokenizer, r.prompt, chat=True)) for r in records]
    show_prompts(Console(file=out, width=200), tokenizer, "prompts.train.jsonl: format prompt", prompts)
    lines = out.getvalue().splitlines()
    assert lines[0] == "prompts.train.jsonl: format prompt"
    assert lines[1] == lines[3] == "7 tokens:"
    assert [line.replace(" ", "") for line in lines[2::2]] == [
        "<s>user:hi</s>assistant:",
        "<s>user:why</s>assistant:",
    ]


def test_colour_replaces_the_marks_on_a_terminal() -> None:
    text = shown([([6, 8], [False, True])], color=True)
    assert "\u27e6" not in text
    assert "\x1b[1;32m" in text


def test_control_characters_of_the_data_do_not_reach_the_terminal() -> None:
    text = shown([([WORDS.index("\x1b"), 8], [True, True])])
    assert "\x1b" not in text
    assert "\ufffd" in text


def test_long_examples_lose_their_middle_and_only_two_are_shown() -> None:
    text = shown([([8] * 1000, [True] * 1000)] * 3)
    assert text.count("1000 tokens, 1000 of them trained") == 2
    body = text.splitlines()[2]
    assert " characters ... " in body
    assert len(body) < 660
