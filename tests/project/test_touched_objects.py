"""What users do to `falcon.model` and `falcon.tokenizer`, times the public functions.

Each call gives the value of an untouched Falcon with the same weights, or is refused in the kit's own words; and the
user's change is still there afterwards.
"""

import base64
import copy
import inspect
import traceback
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import falcon_kit as fk
from falcon_kit.evaluation.tasks import make_task
from falcon_kit.generation.control_tokens import encode_prompt
from tests.conftest import small_model
from tests.tuning.small_runs import QUICK, talk

TEXT = "The giraffe eats the leaves of trees"
ROWS = [talk("What is a giraffe?", "A tall animal."), talk("What is a lion?", "A large cat.")]
CHOICE = ("row", {"prompt": "Giraffes eat", "choices": ["fish.", "acacia leaves."], "answer": 1})
PAIRS = [{"axis": "age", "stereotype": "The old lion sleeps.", "counterpart": "The young lion sleeps."}] * 2
TUNE = {**QUICK, "max_steps": 1, "held_out": 0, "lora_dropout": 0.0, "quiet": True}
LORA = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}\n{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@dataclass
class Places:
    """The untouched Falcon, an adapter that was tuned on it, and an empty folder."""

    clean: fk.Falcon
    adapter: Path
    empty: Path


# What users do; each change returns a function that tells whether it is still there


def add_adapter(falcon):
    torch.manual_seed(0)
    falcon.model.add_adapter(LORA, adapter_name="default")
    weight = falcon.model.transformer.h[0].self_attention.query_key_value.lora_B["default"].weight
    before = weight.clone()
    return lambda: falcon.model.active_adapters() == ["default"] and torch.equal(weight, before)


def wrap_in_peft(falcon):
    torch.manual_seed(0)
    wrapped = get_peft_model(falcon.model, LORA, adapter_name="mine")
    weight = falcon.model.transformer.h[0].self_attention.query_key_value.lora_B["mine"].weight
    return lambda: wrapped.active_adapter == "mine" and weight is dict(wrapped.named_parameters())[NAME]


NAME = "base_model.model.transformer.h.0.self_attention.query_key_value.lora_B.mine.weight"


def add_tokens(falcon):
    torch.manual_seed(0)
    falcon.tokenizer.add_tokens(["<giraffe>"])
    falcon.model.resize_token_embeddings(2056)
    return lambda: len(falcon.model.get_input_embeddings().weight) == 2056 and "<giraffe>" in falcon.tokenizer.vocab


def turn_gradients_off(falcon):
    torch.set_grad_enabled(False)
    return lambda: not torch.is_grad_enabled()


def dispatch(falcon):
    dispatch_model(falcon.model, {"": "cpu"}, force_hooks=True)
    return lambda: hasattr(falcon.model, "_hf_hook")


def half(falcon):
    falcon.model.half()
    return lambda: falcon.model.dtype == torch.float16


def to_bfloat16(falcon):
    falcon.model.to(torch.bfloat16)
    return lambda: falcon.model.dtype == torch.bfloat16


def train(falcon):
    falcon.model.train()
    return lambda: all(each.training for each in falcon.model.modules())


def eager(falcon):
    falcon.model.set_attn_implementation("eager")
    return lambda: falcon.model.config._attn_implementation == "eager"


def pad_token(falcon):
    falcon.tokenizer.add_special_tokens({"pad_token": "!"})
    return lambda: falcon.tokenizer.pad_token == "!"


def generation_settings(falcon):
    falcon.model.generation_config.output_scores = True
    falcon.model.generation_config.renormalize_logits = True
    return lambda: falcon.model.generation_config.output_scores and falcon.model.generation_config.renormalize_logits


def checkpointing(falcon):
    falcon.model.activation_checkpointing_enable()
    falcon.model.enable_input_require_grads()
    return lambda: falcon.model.is_activation_checkpointing and falcon.model._require_grads_hooks


def another_template(falcon):
    falcon.tokenizer.chat_template = TEMPLATE
    return lambda: falcon.tokenizer.chat_template == TEMPLATE


def truncate_and_pad(falcon):
    backend = falcon.tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    return lambda: backend.truncation["max_length"] == 2 and backend.padding["length"] == 9


CHANGES = [
    *(add_adapter, wrap_in_peft, add_tokens, turn_gradients_off, dispatch, half, to_bfloat16, train, eager, pad_token),
    *(generation_settings, checkpointing, another_template, truncate_and_pad),
]

# The public functions; each returns what can be compared


def text(falcon):
    """A text whose last token is the last one of the vocabulary."""
    return [*encode_prompt(TEXT, falcon.tokenizer), len(falcon.tokenizer) - 1]


def generate(falcon, places):
    return falcon.generate(text(falcon), max_new_tokens=4).tokens


def batch(falcon, places):
    return [token for each in falcon.generate([TEXT, "Lions eat"], max_new_tokens=4) for token in each.tokens]


def stream(falcon, places):
    return [piece.token_id for piece in falcon.stream(text(falcon), max_new_tokens=4)]


def chat(falcon, places):
    return falcon.chat([{"role": "user", "content": TEXT}], max_new_tokens=4).tokens


def attention(falcon, places):
    return fk.attention(falcon, text(falcon)).statistics["entropy"]


def lens(falcon, places):
    return fk.lens(falcon, text(falcon)).target_logits


def ablate(falcon, places):
    return fk.ablate(falcon, text(falcon), heads=[(0, 1)]).after


def attribute(falcon, places):
    return fk.attribute(falcon, text(falcon), 42, steps=4).scores


def tokens(falcon, places):
    return [each.id for each in fk.tokens(TEXT, falcon.tokenizer).tokens]


def pack(falcon, places):
    return fk.pack(fk.dialogues(ROWS), falcon, context=64)[0]["input_ids"]


def tune(falcon, places):
    run = fk.tune(falcon, ROWS, output_dir=places.empty / "run", **TUNE)
    return next(iter(load_file(run.adapter / "adapter_model.safetensors").values()))


def merge(falcon, places):
    return logits(fk.merge(places.adapter, falcon))


def export_gguf(falcon, places):
    return np.fromfile(fk.export_gguf(falcon, places.empty / "falcon.gguf"), np.uint8)


def evaluate(falcon, places):
    return [part.nats for part in fk.evaluate(falcon, text=[TEXT, "Lions eat zebras"], stride=2).perplexity.parts]


def choices(falcon, places):
    return [item["loglikelihoods"] for item in fk.evaluate(falcon, make_task("food", [CHOICE])).tasks[0].items]


def bias(falcon, places):
    return [pair.difference for pair in fk.bias(falcon, PAIRS).pairs]


def induction(falcon, places):
    return fk.induction(falcon, period=8).statistics["entropy"]


def explain(falcon, places):
    logits = fk.explain(falcon, text(falcon)).page([0]).data["start"]["text"]["logits"]["f32"]
    return np.frombuffer(base64.b64decode(logits), np.float32)


def playground(falcon, places):
    session = fk.playground(falcon).session
    session.set(temperature=None, top_k=None, do_sample=False, max_new_tokens=4)
    spans = session.generate(TEXT).answers[0].spans
    return [token.logprob for span in spans for token in span.tokens]


FUNCTIONS = [
    *(generate, batch, stream, chat, attention, lens, ablate, attribute, tokens, pack, tune, merge, export_gguf),
    *(evaluate, choices, bias, induction, explain, playground),
]
WITHIN = {"ablated", "repeated_tokens"}
"""What ablate and induction call."""


REFUSED = {(change, function) for change in (add_adapter, wrap_in_peft) for function in (tune, merge, export_gguf)}
REFUSED.add((add_tokens, tune))
"""What is refused, because the user's adapter would be lost, or the added token from the new adapter."""


def logits(falcon):
    with torch.inference_mode():
        return falcon.model(torch.tensor([text(falcon)])).logits[0, -1].float()


# The table


@pytest.fixture(scope="module")
def places(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("touched")
    model = small_model("40b", hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    clean = fk.load(folder / "base", dtype="float32")
    run = fk.tune(clean, ROWS, output_dir=folder / "run", **TUNE)
    return Places(clean, run.adapter, folder)


@pytest.fixture(autouse=True)
def gradients_afterwards():
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def references(places):
    """For each change of weights or tokens, the Falcon that is saved with it and loaded again; else the untouched."""
    found = dict.fromkeys(CHANGES, places.clean)
    for change in (add_adapter, wrap_in_peft, half, to_bfloat16, add_tokens, pad_token, another_template):
        touched = copied(places.clean)
        change(touched)
        model = merged_by_peft(touched.model) if change in (add_adapter, wrap_in_peft) else touched.model
        folder = places.empty / change.__name__ / "base"
        model.save_pretrained(folder)
        touched.tokenizer.save_pretrained(folder)
        found[change] = fk.load(folder, dtype=model.dtype)
        found[change].model.single_rows_without_onednn = False  # another kernel rounds differently
    return found


@pytest.fixture(scope="module")
def expected(places, references, tmp_path_factory):
    """The value of a function for the reference of a change, computed once for each reference."""

    first = {change: next(each for each in CHANGES if references[each] is references[change]) for change in CHANGES}

    @cache
    def computed(change, function):
        falcon = references[change]
        return np.asarray(function(falcon, replace(places, empty=tmp_path_factory.mktemp("expected"))))

    return lambda change, function: computed(first[change], function)


def merged_by_peft(model):
    """The model with the user's adapter in its weights."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    clean = type(model)(copy.deepcopy(model.config)).eval()
    merged = {name: each for name, each in model.state_dict().items() if "lora_" not in name}
    clean.load_state_dict({name.replace(".base_layer.", "."): each for name, each in merged.items()})
    return clean


def copied(falcon):
    return replace(falcon, model=copy.deepcopy(falcon.model), tokenizer=copy.deepcopy(falcon.tokenizer))


def test_every_function_that_takes_a_falcon_is_in_this_table():
    functions = {name: each for name in fk.__all__ if inspect.isfunction(each := getattr(fk, name))}
    taking = {name for name, each in functions.items() if "falcon" in inspect.signature(each).parameters}
    assert taking - {each.__name__ for each in FUNCTIONS} == WITHIN


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_a_touched_object_gives_the_right_value_or_a_refusal_and_stays_touched(
    change, function, places, expected, tmp_path
):
    falcon = copied(places.clean)
    still_there = change(falcon)
    if (change, function) in REFUSED:
        with pytest.raises(
            ValueError, match=r"the model (already )?has .*adapter|the token .* is not as in"
        ) as refusal:
            function(falcon, replace(places, empty=tmp_path))
        assert "falcon_kit" in traceback.extract_tb(refusal.tb)[-1].filename, "not in the kit's own words"
        assert not [*tmp_path.iterdir()]
        assert still_there()
    else:
        actual = function(falcon, replace(places, empty=tmp_path))
        assert still_there()
        torch.set_grad_enabled(True)
        exact = function in (generate, batch, stream, chat, tokens, pack, export_gguf)
        tolerance = 0 if exact else 1e-4 if falcon.model.dtype == torch.float32 else 0.05
        np.testing.assert_allclose(np.asarray(actual), expected(change, function), rtol=tolerance, atol=tolerance)
