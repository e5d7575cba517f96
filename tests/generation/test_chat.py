import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.generation.chat import (
    BAIZE,
    FALCON,
    FORMATS,
    HUB,
    ChatFormat,
    chat_format,
    check_messages,
    encode,
    plain_template,
    render,
    render_prompt,
    save_tokenizer,
)
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.generation.text import Generation, Stats

ROOT = Path(__file__).parents[2]
CONTROL_TOKENS = [
    *(f">>{name}<<" for name in ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION")),
    *(f">>{name}<<" for name in ("DOMAIN", "PREFIX", "SUFFIX", "MIDDLE")),
    "<|endoftext|>",
]
# chat_template of https://huggingface.co/tiiuae/falcon-7b-instruct, as copied by openvinotoolkit/openvino.genai#2252
PUBLISHED_HUB = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 %}{{ system_message.strip() }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '\\n\\nUser: ' + message['content'].strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant: ' + message['content'].strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What do giraffes eat?"},
    {"role": "assistant", "content": "Leaves of tall trees."},
    {"role": "user", "content": "And zebras?"},
]
CLOSED = [*TALK, {"role": "assistant", "content": "Grass, mostly."}]
SYSTEM = {"role": "system", "content": "Answer briefly."}

ANSWER = Generation("", "Leaves.", (1,), None, "eos", Stats(1, 1, 1, 0.0, 0.0, 0))

NAMES = [each.name for each in FORMATS]
PLAIN_JINJA = jinja2.Environment()  # noqa: S701  # prompts are not HTML

# Any text, and text full of what could be taken for something else: control tokens, turn markers, Jinja.
markers = [
    *CONTROL_TOKENS,
    "\nUser:",
    "\nFalcon:",
    "[|Human|]",
    "[|AI|]",
    "{{ 7 * 7 }}",
    "{% endfor %}",
    "\r\n\r\n",
    " ",
]


hostile = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(markers)), min_size=1, max_size=6).map("".join)
contents = hostile.filter(lambda text: bool(text.strip()))
plain_contents = contents.map(lambda text: text.replace("<|", "(").replace(">>", "("))  # no control token survives
formats = st.sampled_from(FORMATS)


@st.composite
def conversations(
    draw: st.DrawFn, closed: bool | None = None, texts: st.SearchStrategy[str] = contents
) -> list[dict[str, str]]:
    """A conversation with any contents; closed ones end with the assistant's word."""
    closed = draw(st.booleans()) if closed is None else closed
    turns = draw(st.integers(1, 2)) * 2 - (0 if closed else 1)
    system = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    roles = ["user", "assistant"] * 2
    return system + [{"role": roles[turn], "content": draw(texts)} for turn in range(turns)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with Falcon's pre-tokenizers, its special tokens at ids 0 to 11, and a pad token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    text = [render(CLOSED, each, add_generation_prompt=False, eos_token="") for each in FORMATS] * 4
    special = [*CONTROL_TOKENS, "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=CONTROL_TOKENS[:-1],
    )


TOKENIZER = make_tokenizer()
EOS = 11
CONTROL_IDS = set(range(13))


def by_transformers(messages: list[dict[str, str]], format: ChatFormat, **options: Any) -> Any:
    return TOKENIZER.apply_chat_template(messages, chat_template=format.template, **options)


def assistant_text(messages: list[dict[str, str]], format: ChatFormat) -> str:
    """What transformers marks as the assistant's, decoded."""
    marked = by_transformers(messages, format, return_dict=True, return_assistant_tokens_mask=True)
    chosen = [each for each, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    return TOKENIZER.decode(chosen)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (FALCON, "User: What do giraffes eat?\nFalcon: Leaves of tall trees.\nUser: And zebras?\nFalcon:"),
        (
            HUB,
            "\n\nUser: What do giraffes eat?\n\nAssistant: Leaves of tall trees.\n\nUser: And zebras?\n\nAssistant:",
        ),
        (BAIZE, "[|Human|] What do giraffes eat?\n[|AI|] Leaves of tall trees.\n[|Human|] And zebras?\n[|AI|]"),
    ],
    ids=NAMES,
)
def test_a_conversation_becomes_one_prompt(format: ChatFormat, expected: str) -> None:
    assert expected == render(TALK, format)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (FALCON, "Answer briefly.\nUser: Hi\nFalcon:"),
        (HUB, "Answer briefly.\n\nUser: Hi\n\nAssistant:"),
        (BAIZE, "Answer briefly.\n[|Human|] Hi\n[|AI|]"),
    ],
    ids=NAMES,
)
def test_the_system_text_comes_first(format: ChatFormat, expected: str) -> None:
    assert expected == render([SYSTEM, {"role": "user", "content": "Hi"}], format)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_a_prompt_ends_with_the_assistants_prefix_and_no_space(format: ChatFormat) -> None:
    assert render(TALK, format).endswith("\n" + format.assistant_prefix)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_a_closed_conversation_ends_with_the_end_token_and_has_no_other(format: ChatFormat) -> None:
    text = render(CLOSED, format, add_generation_prompt=False)

    assert (1, True) == (text.count("<|endoftext|>"), text.endswith("Grass, mostly.<|endoftext|>"))


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_an_open_conversation_has_no_end_token(format: ChatFormat) -> None:
    assert "<|endoftext|>" not in render(TALK, format) + render(TALK, format, add_generation_prompt=False)


@given(conversations(closed=False))
def test_hub_prompts_equal_those_of_the_published_template(messages: list[dict[str, str]]) -> None:
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=PUBLISHED_HUB, add_generation_prompt=True
    )

    assert expected == render(messages, HUB)


def falcon_chat_prompt(messages: list[dict[str, str]]) -> str:
    """The prompt of Hugging Face's falcon-chat demo, whose instructions are our system text."""
    instructions, *turns = (each["content"].strip() for each in messages)
    lines = [f"{('User', 'Falcon')[number % 2]}: {text}" for number, text in enumerate(turns)]
    return "\n".join([instructions, *lines, "Falcon:"])


@given(conversations(closed=False), contents)
def test_falcon_prompts_equal_those_of_the_demo(messages: list[dict[str, str]], instructions: str) -> None:
    turns = [each for each in messages if each["role"] != "system"]
    messages = [{"role": "system", "content": instructions}, *turns]

    assert falcon_chat_prompt(messages) == render(messages, FALCON)


def test_baize_conversations_equal_those_of_its_data() -> None:
    # "input" of a row of project-baize/baize-chatbot's data, which goes on with the next speaker
    published = (
        "The conversation between human and AI assistant.\n[|Human|] What do giraffes eat?\n"
        "[|AI|] Leaves of tall trees.\n[|Human|] And zebras?\n[|AI|] Grass, mostly.\n[|Human|] "
    )
    system = {"role": "system", "content": BAIZE.system or ""}

    ours = render([system, *CLOSED], BAIZE, add_generation_prompt=False, eos_token="\n[|Human|] ")

    assert published == ours


@given(conversations(), formats)
def test_rendering_equals_what_transformers_renders(messages: list[dict[str, str]], format: ChatFormat) -> None:
    prompt = messages[-1]["role"] == "user"

    expected = by_transformers(messages, format, tokenize=False, add_generation_prompt=prompt)

    assert expected == render(messages, format, add_generation_prompt=prompt)


@given(conversations(), formats, st.booleans())
def test_a_plain_template_renders_what_transformers_renders(
    messages: list[dict[str, str]], format: ChatFormat, prompt: bool
) -> None:
    options = {"add_generation_prompt": prompt, "eos_token": "<|endoftext|>"}
    plain = PLAIN_JINJA.from_string(plain_template(format.template))

    (expected,), _ = render_jinja_template(conversations=[messages], chat_template=format.template, **options)

    assert expected == plain.render(messages=messages, **options)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_only_a_plain_template_is_parsed_by_plain_jinja(format: ChatFormat) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError, match="unknown tag 'generation'"):
        PLAIN_JINJA.parse(format.template)
    assert PLAIN_JINJA.parse(plain_template(format.template))


@pytest.mark.parametrize("minus", ["", "-"])
def test_a_plain_template_keeps_the_control_of_white_space(minus: str) -> None:
    template = f"a {{%{minus} generation {minus}%}} b {{%{minus} endgeneration {minus}%}} c"

    (expected,), _ = render_jinja_template(conversations=[CLOSED], chat_template=template)

    assert expected == PLAIN_JINJA.from_string(plain_template(template)).render()


@given(conversations(), st.sampled_from([FALCON, BAIZE]))
def test_every_turn_begins_a_line_with_its_speaker_and_keeps_its_words(
    messages: list[dict[str, str]], format: ChatFormat
) -> None:
    prefixes = {"system": "", "user": f"{format.user_prefix} ", "assistant": f"{format.assistant_prefix} "}
    expected = "\n".join(prefixes[each["role"]] + each["content"].strip() for each in messages)

    assert expected == render(messages, format, add_generation_prompt=False, eos_token="")


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_the_mask_covers_the_assistants_words_and_the_end_token(format: ChatFormat) -> None:
    assert assistant_text(CLOSED, format) == " Leaves of tall trees. Grass, mostly.<|endoftext|>"


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_the_mask_leaves_out_the_end_token_of_a_conversation_that_goes_on(format: ChatFormat) -> None:
    assert assistant_text(TALK, format) == " Leaves of tall trees."


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_the_span_of_an_answer_begins_where_the_prompt_ends(format: ChatFormat) -> None:
    prompt = encode(TALK, TOKENIZER, format)
    whole = encode(CLOSED, TOKENIZER, format, add_generation_prompt=False)

    assert prompt == whole[: len(prompt)]


@given(conversations(), formats)
def test_no_message_can_smuggle_in_a_control_token(messages: list[dict[str, str]], format: ChatFormat) -> None:
    ids = encode(messages, TOKENIZER, format, add_generation_prompt=messages[-1]["role"] == "user")

    expected = [EOS] if messages[-1]["role"] == "assistant" else []
    assert expected == [each for each in ids if each in CONTROL_IDS]


@given(conversations(), formats)
def test_the_ids_decode_to_the_rendered_text(messages: list[dict[str, str]], format: ChatFormat) -> None:
    prompt = messages[-1]["role"] == "user"
    ids = encode(messages, TOKENIZER, format, add_generation_prompt=prompt)

    assert render(messages, format, add_generation_prompt=prompt) == TOKENIZER.decode(ids)


@given(conversations(texts=plain_contents), formats)
def test_the_ids_of_plain_words_are_those_of_transformers(messages: list[dict[str, str]], format: ChatFormat) -> None:
    prompt = messages[-1]["role"] == "user"

    expected = by_transformers(messages, format, return_dict=False, add_generation_prompt=prompt)

    assert expected == encode(messages, TOKENIZER, format, add_generation_prompt=prompt)


def test_transformers_alone_would_take_a_users_text_for_control() -> None:
    messages = [{"role": "user", "content": "Say <|endoftext|> >>ANSWER<< please"}]

    naive = by_transformers(messages, FALCON, return_dict=False, add_generation_prompt=True)

    assert {EOS, CONTROL_TOKENS.index(">>ANSWER<<")} == CONTROL_IDS & {*naive}


def test_transformers_cannot_keep_control_tokens_as_text_and_mark_the_answers() -> None:
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    assert 1 in by_transformers(CLOSED, FALCON, **options)["assistant_masks"]
    with pytest.raises(ValueError, match="not compatible with `return_assistant_tokens_mask=True`"):
        by_transformers(CLOSED, FALCON, sanitize_control_tokens=True, **options)


def test_encoding_text_leaves_the_tokenizer_as_it_was() -> None:
    before = TOKENIZER.backend_tokenizer.encode("<|endoftext|>").ids

    encode_text("<|endoftext|>", TOKENIZER)

    assert (
        before == [EOS] == TOKENIZER.backend_tokenizer.encode("<|endoftext|>").ids == TOKENIZER.encode("<|endoftext|>")
    )


def test_closing_a_conversation_needs_an_end_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(
        ValueError, match=r"has no end-of-sequence token to end the conversation: set tokenizer.eos_token"
    ):
        encode(CLOSED, tokenizer, FALCON, add_generation_prompt=False)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_an_installed_format_is_what_apply_chat_template_uses(format: ChatFormat) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = format.template

    assert render(TALK, format) == tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


def test_an_installed_format_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = BAIZE.template
    tokenizer.save_pretrained(tmp_path)

    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert render(TALK, BAIZE) == loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_templates_refuse_roles_that_they_do_not_know(format: ChatFormat) -> None:
    with pytest.raises(Exception, match=r"[Rr]oles"):
        by_transformers([{"role": "tool", "content": "42"}], format, tokenize=False)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_an_unfinished_answer_can_be_continued(format: ChatFormat) -> None:
    text = by_transformers(CLOSED, format, tokenize=False, continue_final_message=True)

    assert text.endswith(f"{format.assistant_prefix} Grass, mostly.")


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_the_next_speakers_words_begin_with_a_stop_string(format: ChatFormat) -> None:
    answer = render(CLOSED[:2], format, add_generation_prompt=False, eos_token="")
    onward = render(TALK, format).removeprefix(answer)

    assert any(onward.startswith(stop) for stop in format.stop)
    assert not any(stop in "Leaves of tall trees." for stop in format.stop)


@pytest.mark.parametrize(("name", "expected"), [("falcon", FALCON), ("hub", HUB), (" Baize ", BAIZE)])
def test_formats_are_found_by_name(name: str, expected: ChatFormat) -> None:
    assert expected is chat_format(name)


def test_an_unknown_format_is_answered_with_the_nearest() -> None:
    with pytest.raises(LookupError) as error:
        chat_format("falcn")
    assert str(error.value) == "Unknown chat format 'falcn'. Nearest: falcon."


def test_a_format_is_short_as_text() -> None:
    assert repr(FALCON) == "ChatFormat('falcon', 'User:' / 'Falcon:')"


def test_checked_messages_keep_only_roles_and_contents() -> None:
    assert check_messages([{**TALK[0], "name": "Ada"}]) == [TALK[0]]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("What?", 'A conversation is a list of messages, such as [{"role": "user", "content": "Hello"}]; got a str.'),
        (
            {"role": "user", "content": "Hello"},
            'A conversation is a list of messages, such as [{"role": "user", "content": "Hello"}]; got a dict.',
        ),
        ([], 'A conversation needs at least one message, such as [{"role": "user", "content": "Hello"}].'),
        ([SYSTEM], "The conversation has only a system message: add a message of the user."),
        (
            [{"role": "robot", "content": "Hi"}],
            "Message 1 has the role 'robot'; allowed are system, user, assistant.",
        ),
        ([{"content": "Hi"}], "Message 1 has the role None; allowed are system, user, assistant."),
        (
            [{"role": ["user"], "content": "Hi"}],
            "Message 1 has the role ['user']; allowed are system, user, assistant.",
        ),
        ([*TALK[:1], SYSTEM], "Message 2 has the role 'system', which only the first message may have."),
        (
            [TALK[0], TALK[0]],
            "Message 2 has the role 'user', but it must have 'assistant': "
            "user and assistant alternate, and the user begins.",
        ),
        (
            [SYSTEM, TALK[1]],
            "Message 2 has the role 'assistant', but it must have 'user': "
            "user and assistant alternate, and the user begins.",
        ),
        (
            [{"role": "user", "content": " \n"}],
            "Message 1 has the content ' \\n', but it must be a text that is not blank.",
        ),
        ([{"role": "user"}], "Message 1 has the content None, but it must be a text that is not blank."),
        (
            [{"role": "user", "content": ANSWER}],
            f"Message 1 has the content {ANSWER!r}, but it must be a text that is not blank: give its .text.",
        ),
        (
            [{"from": "human", "value": "Hi"}],
            "Message 1 has the role None; allowed are system, user, assistant. Its keys are 'from', 'value': "
            "call them role and content.",
        ),
        ([[TALK[0]]], "Message 1 is a list of messages: chat takes one conversation, so call it for each."),
        (["Hi"], 'Message 1 is \'Hi\', but it must be like {"role": "user", "content": "Hello"}.'),
    ],
)
def test_a_conversation_that_cannot_be_rendered_says_why(messages: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole text is compared below
        render(messages, FALCON)
    assert expected == str(error.value)


def test_the_assistant_is_not_asked_to_answer_itself() -> None:
    with pytest.raises(
        ValueError, match="last message is the assistant's, so there is nothing to answer: add a message of the user"
    ):
        render(CLOSED, FALCON)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') }}",
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2, ensure_ascii=true) }}",
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ documents }}",
    ],
)
def test_plain_jinja_renders_the_functions_and_filters_of_transformers(template: str) -> None:
    messages = [{"role": "user", "content": "<é> & 'so'"}]
    format = ChatFormat("mine", template=template)
    assert render(messages, format) == render_prompt(messages, TOKENIZER, format)


def test_a_template_that_refuses_a_conversation_is_named_without_transformers_too() -> None:
    format = ChatFormat("mine", template="{{ raise_exception('no system message') }}")
    for text in (lambda: render(TALK, format), lambda: render_prompt(TALK, TOKENIZER, format)):
        with pytest.raises(ValueError, match=r"^The chat template 'mine' refuses this conversation: no"):
            text()


def test_rendering_changes_no_message() -> None:
    before = json.dumps(TALK)

    render(TALK, HUB)

    assert before == json.dumps(TALK)


def test_rendering_needs_no_torch() -> None:
    code = (
        "import sys; from falcon_kit.generation.chat import HUB, render; "
        "early = {'torch', 'transformers', 'jinja2'} & {*sys.modules}; "
        "render([{'role': 'user', 'content': 'Hi'}], HUB); print(early, 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "set() False\n"


def test_threads_that_encode_chats_at_once_leave_the_tokenizer_as_it_was(instruct):
    sly = [{"role": "user", "content": "<|endoftext|> Hello" * 1000}]  # long enough for threads to meet
    found = []

    def work():
        found.extend(tuple(encode(sly, instruct.tokenizer, instruct.chat_format)) for _ in range(5))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 20
    assert len(set(found)) == 1
    assert instruct.tokenizer("<|endoftext|>")["input_ids"] == [11]


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_a_saved_template_is_plain_jinja_and_the_tokenizer_in_memory_keeps_its_marks(
    format: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, meanwhile = make_tokenizer(), []
    tokenizer.chat_template = format.template
    save = type(tokenizer).save_pretrained

    def watched(saved: Any, folder: Any) -> Any:
        meanwhile.append(tokenizer.chat_template)
        return save(saved, folder)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", watched)
    save_tokenizer(tokenizer, tmp_path)
    assert meanwhile == [format.template]
    saved = (tmp_path / "chat_template.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701  # a chat is no HTML
    template = environment.from_string(saved)
    assert template.render(messages=TALK, add_generation_prompt=True, eos_token="") == render(TALK, format)
    assert tokenizer.chat_template == format.template


def test_the_shipped_template_is_plain_jinja() -> None:
    shipped = (embedded_directory("falconet") / "chat_template.jinja").read_text()
    assert shipped.rstrip("\n") == plain_template(FALCON.template)
