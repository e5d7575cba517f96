"""The public functions that take a Falcon, each as a case that returns numbers to compare.

The tests of several devices and of a GPU compare what they give there with what they give on a CPU.
"""

import copy
import json
import math
import warnings
from itertools import count
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from IPython.core.inputtransformer2 import TransformerManager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import falcon_kit as fk
from falcon_kit.serving.source import files_for, source_of
from tests.conftest import small_model
from tests.tuning.small_runs import QUICK, talk

NOTEBOOK = Path(__file__).parents[2] / "notebooks/04_architecture.ipynb"
TEXT = "The giraffe eats the leaves of trees"
CHAT = [{"role": "user", "content": TEXT}]
ROWS = [talk(f"What is {each}?", f"{each} is an animal.") for each in ("a giraffe", "a lion", "an elephant", "a seal")]
TUNE = {**QUICK, "max_steps": 2, "lora_dropout": 0.0, "quiet": True, "held_out": 0.25}


def greedy(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8).tokens


def sampled(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8, temperature=1.0, seed=3).tokens


def beams(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8, num_beams=3).tokens


def batch(falcon, places):
    return [each.tokens for each in falcon.generate([TEXT, "Lions"], max_new_tokens=8)]


def sequences(falcon, places):
    settings = {"num_return_sequences": 3, "temperature": 1.0, "seed": 1}
    return [each.tokens for each in falcon.generate(TEXT, max_new_tokens=8, **settings)]


def stop_string(falcon, places):
    first = falcon.generate(TEXT, max_new_tokens=8)
    return falcon.generate(TEXT, max_new_tokens=8, stop=first.text[4:7]).tokens


def alternatives(falcon, places):
    steps = falcon.generate(TEXT, max_new_tokens=4, alternatives=3).alternatives
    return [[each.logprob for each in step] for step in steps]


def assisted(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8, assistant_model=falcon.model).tokens


def prompt_lookup(falcon, places):
    return falcon.generate(TEXT * 2, max_new_tokens=8, prompt_lookup_num_tokens=2).tokens


def assisted_stream(falcon, places):
    settings = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "temperature": 0.1, "seed": 2}
    return [(piece.logprob, piece.accepted) for piece in falcon.stream(TEXT * 2, **settings)]


def static_cache(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8, cache_implementation="static").tokens


def chunked_prefill(falcon, places):
    return falcon.generate(TEXT, max_new_tokens=8, prefill_chunk_size=4).tokens


def eager_attention(falcon, places):
    falcon.model.set_attn_implementation("eager")
    try:
        return falcon.generate(TEXT, max_new_tokens=8).tokens
    finally:
        falcon.model.set_attn_implementation("sdpa")


def stream(falcon, places):
    return [piece.logprob for piece in falcon.stream(TEXT, max_new_tokens=8, temperature=1.0, seed=2)]


def chat(falcon, places):
    return falcon.chat(CHAT, max_new_tokens=8).tokens


def playground(falcon, places):
    session = fk.playground(falcon).session
    session.set(max_new_tokens=8, seed=0)
    return session.generate(TEXT).answers[0].text.encode()


def loss(falcon, places):
    """As users compute it: with tokens on the CPU, and the gradient of each layer's norm. And with a count of labels on
    the device of the first layer, as the Trainer's."""
    ids = torch.tensor([falcon.tokenizer(TEXT)["input_ids"]])
    norms = [getattr(each, each.norms[0]).weight for each in falcon.model.transformer.h]
    for each in norms:
        each.requires_grad_()
    try:
        count = torch.tensor(5, device=norms[0].device)
        losses = [falcon.model(ids, labels=ids, skip_logits=skip).loss for skip in (False, True)]
        losses.append(falcon.model(ids, labels=ids, skip_logits=True, num_items_in_batch=count).loss)
        gradients = torch.autograd.grad(losses[0] + losses[1], norms)
        return [*(float(each) for each in losses), *(float(each.norm()) for each in gradients)]
    finally:
        for each in norms:
            each.requires_grad_(False)


def packed_documents(falcon, places):
    ids = torch.arange(3, 27).reshape(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    with torch.inference_mode():
        return falcon.model(ids, position_ids=positions).logits.cpu().numpy()


def notebook_04(falcon, places):
    """Falcon from scratch; the notebook also compares it with the model, part by part."""
    names = {}
    cells = [each["source"] for each in json.loads(NOTEBOOK.read_text())["cells"] if each["cell_type"] == "code"]
    cells = ["".join(each) for each in cells]
    last = next(index for index, each in enumerate(cells) if "check(falcon_from_scratch(ids)" in each)
    load, fk.load = fk.load, lambda _: falcon
    try:
        for cell in cells[: last + 1]:
            exec(TransformerManager().transform_cell(cell), names)  # noqa: S102  # the project's own notebook
        return names["falcon_from_scratch"](names["ids"]).cpu().numpy()
    finally:
        fk.load = load
        torch.set_grad_enabled(True)


def attention(falcon, places):
    found = fk.attention(falcon, TEXT, layers=[0, 3], prefill_chunk_size=3)
    return [*found.statistics["entropy"].ravel(), *found.map(3, 1).ravel()]


def induction(falcon, places):
    return fk.induction(falcon, 10).statistics["induction"]


def repeated_tokens(falcon, places):
    return fk.repeated_tokens(falcon, 10)


def lens(falcon, places):
    found = fk.lens(falcon, TEXT)
    return [found.target_logits, found.target_probabilities[2], found.mlp_contribution[3]]


def ablate(falcon, places):
    return fk.ablate(falcon, TEXT, heads=[(0, 1), (3, 0)], replace="mean").after[1:]


def ablated(falcon, places):
    with fk.ablated(falcon, [(3, 1)]):
        return falcon.generate(TEXT, max_new_tokens=8).logprobs


def integrated_gradients(falcon, places):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few steps
        return fk.attribute(falcon, TEXT, 42, steps=4).scores


def leave_one_out(falcon, places):
    found = fk.attribute(falcon, TEXT, 42, method="leave-one-out")
    return math.log(found.target.probability) - found.scores


def tokens(falcon, places):
    return [each.id for each in fk.tokens(TEXT, falcon).tokens]


def compare_tokens(falcon, places):
    return [row.tokens for row in fk.compare_tokens({"English": TEXT, "German": "Die Giraffe"}, falcon).rows]


def pack(falcon, places):
    return fk.pack(fk.dialogues(ROWS), falcon, context=64)[0]["input_ids"]


def tune(falcon, places):
    run = fk.tune(falcon, ROWS, output_dir=places.empty() / "run", **TUNE)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    return [
        *(each["loss"] for each in run.history if "loss" in each),
        *(float(weights[name].norm()) for name in weights),
    ]


def merge(falcon, places):
    merged = fk.merge(places.adapter, falcon)
    return [*merged.generate(TEXT, max_new_tokens=4).logprobs, merged.gap < 1e-5]


def merge_and_save(falcon, places):
    folder = places.empty() / "merged"
    fk.merge(places.adapter, falcon, output_dir=folder)
    return [each.norm() for _, each in sorted(load_file(folder / "model.safetensors").items())]


def export_gguf(falcon, places):
    return np.fromfile(fk.export_gguf(falcon, places.empty() / "falcon.gguf"), np.uint8)


def serve(falcon, places):
    """The files that a server reads; the server itself is a program of others."""
    files = files_for(source_of(falcon), places.empty(), "float32", gguf=False)
    return [each.norm() for _, each in sorted(load_file(files.path / "model.safetensors").items())]


def explain_a_layer(falcon, places):
    """The third of the five layers, which is on the second device."""
    found = fk.explain(falcon, TEXT, layer=2)._record(2)
    heads = found.layer.heads
    values = (found.logits, heads.query, heads.key, heads.value, found.layer.vectors["output"].norm)
    return [float(each.norm()) for each in values]


def explain_a_route(falcon, places):
    return [(step["position"], step["head"], step["key"]) for step in fk.explain(falcon, TEXT)._route()]


def evaluate(falcon, places):
    return fk.evaluate(falcon, "falconet-choices", text=TEXT, limit=4).to_dataframe()["value"].to_numpy(float)


def bias(falcon, places):
    rows = [{"axis": "age", "stereotype": "The old man sleeps.", "counterpart": "The young man sleeps."}]
    return [each.difference for each in fk.bias(falcon, rows).pairs]


def weights(falcon, places):
    return [row.bytes for row in falcon.weights.rows]


TABLE = {
    "generate": [
        *(
            greedy,
            sampled,
            beams,
            batch,
            sequences,
            stop_string,
            alternatives,
            assisted,
            prompt_lookup,
            assisted_stream,
            static_cache,
        ),
        *(chunked_prefill, eager_attention),
    ],
    "stream": [stream],
    "chat": [chat],
    "weights": [weights],
    "model": [loss, packed_documents, notebook_04],
    "playground": [playground],
    "attention": [attention],
    "induction": [induction],
    "repeated_tokens": [repeated_tokens],
    "lens": [lens],
    "ablate": [ablate],
    "ablated": [ablated],
    "attribute": [integrated_gradients, leave_one_out],
    "tokens": [tokens],
    "compare_tokens": [compare_tokens],
    "pack": [pack],
    "tune": [tune],
    "merge": [merge, merge_and_save],
    "export_gguf": [export_gguf],
    "serve": [serve],
    "explain": [explain_a_layer, explain_a_route],
    "evaluate": [evaluate],
    "bias": [bias],
}
"""The public functions and methods that take a Falcon, and what each is compared by."""
WITHOUT_A_FALCON = {
    *("catalogue", "chat_format", "connect", "dialogues", "environment", "guardrails", "load", "mix", "plan"),
    *("published_tokens", "sample_texts", "spec", "check", "requirements", "gguf_file"),
}
CASES = [case for cases in TABLE.values() for case in cases]
RANDOM = {sampled, sequences, stream, assisted_stream, playground}


SIZES = {"hidden_size": 64, "ffn_hidden_size": 128, "num_hidden_layers": 5, "max_position_embeddings": 256}
LORA = LoraConfig(r=2, target_modules=["query_key_value", "dense"], init_lora_weights=False, task_type="CAUSAL_LM")


class Places:
    """A Falcon on the CPU and the same one elsewhere, an adapter of it, and empty folders."""

    def __init__(self, layout, device_map, tied=True):
        """device_map: a function of the FalconSpec."""
        self.folder, self._numbers = Path(mkdtemp()), count()
        tokenizer = fk.load("falconet-instruct").tokenizer
        small_model(layout, tie_word_embeddings=tied, **SIZES).save_pretrained(self.folder / "base")
        tokenizer.save_pretrained(self.folder / "base")
        self.one = fk.load(self.folder / "base", dtype="float32", device_map="cpu")
        self.elsewhere = fk.load(self.folder / "base", dtype="float32", device_map=device_map(self.one.spec))
        self.adapter = self.folder / "adapter"
        attached = get_peft_model(copy.deepcopy(self.one.model), LORA)
        attached.save_pretrained(self.adapter)

    def empty(self):
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        return folder


def value(case, falcon, places):
    """The values of a case, or why it was refused."""
    try:
        return np.asarray(case(falcon, places), dtype=object if case is batch or case is sequences else None)
    except (ValueError, AssertionError) as error:
        return str(error)
