"""Log-probabilities of given tokens are those of a plain loop over transformers' Falcon, in any batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM

from falcon_kit.evaluation.scoring import Row, encode_pairs, score
from falcon_kit.inspection.hooks import inspect_model
from tests.conftest import small_model


@pytest.fixture(scope="module")
def model(layout):
    return small_model(layout)


def loop(model, row):
    """The scores of one row, from all logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([row.ids[:-1]])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(row.ids[1:])
    chosen = logits.gather(-1, targets[:, None])[:, 0][-row.scored :]
    return chosen.tolist(), bool((logits.argmax(-1) == targets)[-row.scored :].all())


IDS = st.lists(st.integers(20, 60), min_size=2, max_size=12)
ROWS = st.lists(IDS.flatmap(lambda ids: st.builds(Row, st.just(tuple(ids)), st.integers(1, len(ids) - 1))), max_size=6)


@settings(max_examples=15)
@given(rows=ROWS, batch_size=st.sampled_from([None, 1, 2]))
def test_scores_are_those_of_a_plain_loop(model, tokenizer, rows, batch_size):
    found = score(inspect_model((model, tokenizer)), rows, batch_size)
    for row, scores in zip(rows, found, strict=True):
        logprobs, greedy = loop(model, row)
        assert (scores.logprobs.tolist(), scores.greedy) == (pytest.approx(logprobs, abs=1e-4), greedy)


def test_rows_with_equal_inputs_are_computed_once(model, tokenizer):
    seen = []
    handle = model.transformer.word_embeddings.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    rows = [Row((30, 31, 32, last), 1) for last in range(40, 60)] + [Row((30, 31, 32, 40), 2)]
    found = score(inspect_model((model, tokenizer)), rows)
    handle.remove()
    assert (seen, len(found[-1].logprobs)) == ([3], 2)


def test_a_model_keeps_its_mode(model, tokenizer):
    model.train()
    score(inspect_model((model, tokenizer)), [Row((30, 31), 1)])
    assert model.training
    model.eval()


def test_an_id_outside_the_vocabulary_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="2048 is no token id of this model, whose ids are 0 to 2047"):
        score(inspect_model((model, tokenizer)), [Row((30, 2048), 1)])


class Peer(TemplateLM):
    """lm-eval's own way to split a pair, with Falconet's tokenizer."""

    eot_token_id = 11

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokenizer(string)["input_ids"]

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [(first, rest) for _, first, rest in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


class Request:
    def __init__(self, *args):
        self.args = args


WORDS = st.text(alphabet="ab zéo \n:.,12中", max_size=12)


@given(context=WORDS, continuation=WORDS)
def test_a_pair_is_split_as_lm_eval_splits_it(tokenizer, context, continuation):
    if context and not context.strip():
        return  # lm-eval has an empty context there, which its models refuse
    try:
        expected = Peer(tokenizer).loglikelihood([Request(context, continuation)], disable_tqdm=True)[0]
    except IndexError:  # both are empty
        expected = ([11], [])
    if not expected[1]:
        with pytest.raises(ValueError, match="has no token of its own"):
            encode_pairs(tokenizer, [(context, continuation)])
    else:
        assert encode_pairs(tokenizer, [(context, continuation)]) == [expected]


def test_an_empty_context_is_the_token_before_a_text(tokenizer):
    (empty, blank) = encode_pairs(tokenizer, [("", "Giraffes"), (" \n", "Giraffes")])
    assert empty == ([11], tokenizer("Giraffes")["input_ids"])
    assert blank[0] == [11]
