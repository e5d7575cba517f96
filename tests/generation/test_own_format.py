"""A checkpoint's own chat template is the one that is used; transformers' apply_chat_template is the oracle."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.generation.chat import FORMATS, encode, encode_answers, render
from falcon_kit.generation.own_format import own_format
from tests.generation.test_chat import CLOSED, PUBLISHED_HUB, SYSTEM, TALK

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}### assistant:\n"
)
SHOUTING = CHATML.replace("message['content']", "message['content'].strip().upper()")
INDENTED = """{% for message in messages %}
    {% if message['role'] == 'assistant' %}
{{ message['content'] }}
    {% else %}
### {{ message['role'] }}: {{ message['content'] }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
### assistant:
{% endif %}"""
OTHERS = {
    "chatml": CHATML,
    "marked": MARKED_CHATML,
    "llama": LLAMA,
    "lines": LINES,
    "upper case": SHOUTING,
    "indented": INDENTED,
}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", ">>ANSWER<<"]


def with_template(instruct, template, directory, special=True):
    """A checkpoint with this template, and ChatML's tokens in its vocabulary."""
    tokenizer = fk.load("falconet-instruct").tokenizer
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=special)
    tokenizer.chat_template = template
    model = fk.load("falconet-instruct").model
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[True, False], ids=["special tokens", "added tokens"])
def falcon(request, instruct, tmp_path_factory):
    """A Falcon whose tokenizer has a ChatML template."""
    return fk.load(with_template(instruct, CHATML, tmp_path_factory.mktemp("chatml"), request.param))


def in_format(falcon, template):
    """The format in which the checkpoint would be loaded with another template."""
    before, falcon.tokenizer.chat_template = falcon.tokenizer.chat_template, template
    try:
        return own_format(falcon.tokenizer, "here")
    finally:
        falcon.tokenizer.chat_template = before


def test_the_checkpoints_own_template_is_the_format_of_the_chat(falcon):
    assert (falcon.chat_format.name, falcon.tokenizer.chat_template) == ("own", CHATML)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("template", OTHERS.values(), ids=OTHERS)
def test_a_conversation_has_the_ids_of_apply_chat_template(falcon, template, system, prompt):
    if system and template is LLAMA:
        pytest.skip("this template refuses system messages")
    messages = [*([SYSTEM] if system else []), *(TALK if prompt else CLOSED)]
    expected = falcon.tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=prompt, return_dict=False
    )
    assert encode(messages, falcon.tokenizer, in_format(falcon, template), prompt) == expected


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"llama"}))  # which wants a bos_token
def test_without_torch_a_template_is_rendered_as_by_transformers(falcon, name):
    options = {"chat_template": OTHERS[name], "add_generation_prompt": True, "tokenize": False}
    expected = falcon.tokenizer.apply_chat_template(TALK, **options)
    assert render(TALK, fk.ChatFormat("mine", template=OTHERS[name])) == expected


words = st.text(alphabet="ab \né🦒<|>", min_size=1, max_size=12) | st.sampled_from(CONTROL)
hostile = st.lists(words, min_size=1, max_size=4).map("".join).filter(lambda text: bool(text.strip()))


@given(hostile)
@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, LLAMA, LINES], ids=["chatml", "marked", "llama", "lines"])
def test_a_control_token_in_a_message_stays_text(falcon, template, content):
    format, tokenizer = in_format(falcon, template), falcon.tokenizer

    def control(text):
        added = tokenizer.added_tokens_decoder.items()
        ids = {id for id, token in added if token.special or token.content in template}
        return [id for id in encode([{"role": "user", "content": text}], tokenizer, format) if id in ids]

    assert control(content) == control("harmless")


@given(hostile)
def test_a_message_with_control_tokens_keeps_its_words(falcon, content):
    messages = [{"role": "user", "content": content}]
    expected = falcon.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert falcon.tokenizer.decode(encode(messages, falcon.tokenizer, in_format(falcon, CHATML))) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, ("<|im_end|>",)), (LLAMA, ("<|endoftext|>",)), (LINES, ("\n### user:\n",)), (SHOUTING, ())],
    ids=["chatml", "llama", "lines", "upper case"],
)
def test_the_stop_string_is_what_ends_a_turn_in_the_template(falcon, template, expected):
    assert in_format(falcon, template).stop == expected


@pytest.mark.parametrize("format", FORMATS, ids=[each.name for each in FORMATS])
def test_a_published_template_is_its_published_format(falcon, format):
    assert in_format(falcon, format.template) is format
    assert in_format(falcon, PUBLISHED_HUB) is fk.chat_format("hub")


@pytest.mark.parametrize(
    ("name", "treatment"),
    [("falcon", ".strip()"), ("hub", ".strip()"), ("baize", ".strip()"), ("hub", r".replace('\n\n', '\n')")],
)
def test_a_template_that_treats_white_space_in_another_way_is_no_published_format(falcon, name, treatment):
    template = fk.chat_format(name).template
    assert (in_format(falcon, template).name, treatment in template) == (name, True)
    assert in_format(falcon, template.replace(treatment, "")).name == "own"


def test_answers_are_marked_as_transformers_marks_them(falcon):
    marked = falcon.tokenizer.apply_chat_template(
        CLOSED, chat_template=MARKED_CHATML, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encode_answers(CLOSED, falcon.tokenizer, in_format(falcon, MARKED_CHATML))
    assert (ids, trained) == (marked["input_ids"], [bool(each) for each in marked["assistant_masks"]])


def test_training_on_a_template_without_marks_is_refused_and_the_advice_works(falcon):
    rows = fk.dialogues([{"messages": CLOSED}])
    assert in_format(falcon, CHATML).name == "own"
    with pytest.raises(ValueError, match=r"does not mark the assistant's messages.* load the model with chat="):
        fk.pack(rows, falcon)
    directory = falcon.model.name_or_path
    for chat in ("falcon", fk.ChatFormat("mine", template=MARKED_CHATML)):
        assert fk.pack(rows, fk.load(directory, chat=chat)).trained_tokens > 0


def test_plain_texts_need_no_marks(falcon):
    assert fk.pack(fk.dialogues([{"text": "Giraffes eat leaves."}]), falcon).tokens > 0


def test_a_template_that_refuses_a_conversation_says_so(falcon):
    with pytest.raises(ValueError, match=r"'own' refuses this conversation: no system message"):
        encode([SYSTEM, *TALK], falcon.tokenizer, in_format(falcon, LLAMA))


def test_an_answer_in_the_checkpoints_format_ends_at_its_end_of_turn(falcon):
    prompt = falcon.tokenizer.apply_chat_template(TALK, chat_template=CHATML, add_generation_prompt=True)["input_ids"]
    end = falcon.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = falcon.chat(TALK, sequence_bias={(end,): 1e4}, max_new_tokens=5)
    assert (answer.tokens, answer.text, answer.finish_reason) == ((end,), "", "stop")
    assert answer.prompt == falcon.tokenizer.decode(prompt)


def test_an_adapter_remembers_a_format_of_its_own(instruct, tmp_path):
    directory = with_template(instruct, CHATML, tmp_path / "base")
    format = fk.ChatFormat("mine", template=MARKED_CHATML, stop="<|im_end|>")
    settings = {"max_steps": 1, "answers": 1, "held_out": 0.5, "quiet": True, "context": 64}
    rows = [{"messages": CLOSED}, {"messages": CLOSED[:2]}]
    run = fk.tune(fk.load(directory, chat=format), rows, output_dir=tmp_path / "run", **settings)
    assert fk.load(run.adapter).chat_format == format


def test_a_checkpoint_with_several_templates_uses_the_default_and_keeps_all(instruct, tmp_path):
    named = {"default": CHATML, "tool_use": LINES}
    falcon = fk.load(with_template(instruct, named, tmp_path / "base"))
    assert (falcon.chat_format.template, falcon.tokenizer.chat_template) == (CHATML, named)
    with pytest.raises(ValueError, match=r"several chat templates and no default: rag, tool_use"):
        fk.load(with_template(instruct, {"rag": LINES, "tool_use": LINES}, tmp_path / "other"))
    assert fk.load(tmp_path / "other", chat=fk.ChatFormat("mine", template=LINES)).chat_format.template == LINES


def with_config(directory, template):
    """Falconet with this value as its chat template."""
    shutil.copytree(embedded_directory("falconet"), directory)
    (directory / "chat_template.jinja").unlink()
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return directory


BROKEN = {
    "a sum of text and number": "{{ messages[0]['content'] + 1 }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a range too long": "{% for each in range(10**9) %}{% endfor %}",
    "loops too deep": "{% for each in messages %}" * 30 + "{% endfor %}" * 30,
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_model_with_a_broken_template_loads_and_its_chat_says_what_is_broken(tmp_path, template):
    falcon = fk.load(with_config(tmp_path / "base", template))
    assert falcon.generate("Hello", max_new_tokens=1).tokens
    with pytest.raises(ValueError, match=r"^The chat template 'own' fails on this conversation \(\w+Error: .+\)"):
        falcon.chat(TALK)


@pytest.mark.parametrize("template", [7, [{"name": "default", "template": 7}]], ids=str)
def test_a_template_that_is_no_text_is_refused_with_the_folder_and_the_advice_works(tmp_path, template):
    directory = with_config(tmp_path / "base", template)
    with pytest.raises(ValueError, match=r"base has the chat template 7, which is no text: .*chat='falcon'"):
        fk.load(directory)
    assert fk.load(directory, chat="falcon").chat(TALK, max_new_tokens=1).tokens


@pytest.mark.parametrize("fields", [{"template": 7}, {"template": "a", "stop": [7]}, {"template": "a", "source": 7}])
def test_a_format_whose_fields_are_no_texts_is_refused(fields):
    with pytest.raises(ValueError, match=r"^a chat format is made of texts; 'mine' has 7$"):
        fk.ChatFormat("mine", **fields)


# A template that is set after loading


def test_a_template_that_is_set_after_loading_is_the_format_of_chat(instruct):
    falcon = fk.load("falconet-instruct")
    falcon.tokenizer.chat_template = LINES
    expected = falcon.tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert (falcon.chat_format.template, falcon.chat_format.stop) == (LINES, ("\n### user:\n",))
    assert falcon.chat(TALK[:1], max_new_tokens=4).prompt == falcon.tokenizer.decode(expected)
    falcon.tokenizer.chat_template = instruct.tokenizer.chat_template
    assert falcon.chat_format is falcon.loaded_format
