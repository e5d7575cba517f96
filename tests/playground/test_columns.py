"""Models side by side, and the code that makes each."""

import math
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import pytest

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.generation.chat import BAIZE
from falcon_kit.generation.text import Alternative, Piece
from falcon_kit.playground.columns import Column, connect_source, load_source
from falcon_kit.playground.records import Token
from falcon_kit.playground.state import Session
from tests.playground.typist import Typist, chatting, failing, text_of
from tests.serving.servers import answering, scripted, tgi
from tests.serving.test_malformed import SageMaker

QUICK = {"max_new_tokens": 12}


# Beside each other


def test_two_models_write_at_the_same_time():
    both = threading.Barrier(2, timeout=10)  # breaks unless both are in the middle of their text together
    first, second = (Typist(name=name, before=lambda number: number != 1 or both.wait()) for name in "ab")
    turn = Session(first, second).generate("go")
    assert [answer.ending for answer in turn.answers] == ["eos", "eos"]


def test_two_settings_are_two_answers_under_names_of_their_own(instruct):
    session = Session(instruct, {"temperature": 0})
    session.set(seed=2, **QUICK)
    turn = session.generate(fk.CARD.prompt)
    expected = [
        instruct.generate(fk.CARD.prompt, seed=2, top_k=10, **QUICK),
        instruct.generate(fk.CARD.prompt, **QUICK),
    ]
    assert text_of(turn) == [each.text for each in expected]
    assert [answer.model for answer in turn.answers] == ["falconet-instruct", "falconet-instruct, temperature=0"]


def test_each_model_reads_its_own_side_of_the_conversation():
    first, second = Typist("left"), Typist("right", name="other")
    session = chatting(first, compare=second)
    session.generate("a")
    session.generate("b")
    assert [typist.asked[1][0][1]["content"] for typist in (first, second)] == ["left", "right"]


def test_two_models_of_one_name_are_told_apart():
    assert [column.name for column in Session(Typist(), Typist()).columns] == ["typist (A)", "typist (B)"]


def test_one_model_that_fails_leaves_the_other():
    turn = Session(Typist(before=failing(1)), Typist()).generate("go")
    assert [(answer.text, answer.ending) for answer in turn.answers] == [("One", "error"), ("One two three.", "eos")]


def test_a_compiled_model_writes_one_text_at_a_time():
    working, most = set(), []
    ids = count()

    class Compiled(Typist):
        decoding = {"cache_implementation": "static"}  # noqa: RUF012  # as on a Falcon

        def stream(self, prompt, **settings):
            working.add(next(ids))
            most.append(len(working))
            time.sleep(0.05)
            return super().stream(prompt, **settings)

    compiled = Compiled(before=lambda number: number != 3 or working.pop())
    Session(compiled, {"temperature": 0}).generate("go")
    assert most == [1, 1]


def test_a_probability_that_is_not_known_is_not_recorded():
    alternatives = [Alternative(text, None, value) for text, value in (("b", -0.5), ("c", -math.inf), ("d", math.nan))]
    token = Column("typist", Typist()).token(Piece("a", None, math.nan, tuple(alternatives)))
    assert token == Token("a", None, (("b", -0.5),))


@pytest.mark.parametrize("shown", ["", "ant", "\ufffd"])
def test_a_token_that_is_none_of_the_likeliest_is_shown_by_itself(instruct, shown):
    """Whatever text the stream had to keep back, or to add."""
    token_id = instruct.tokenizer.encode(" elephant")[-1]
    piece = Piece(shown, token_id, -7.5, (Alternative(" lion", token_id + 1, -0.5),))
    assert Column("a", instruct).token(piece).text == instruct.tokenizer.decode([token_id])


# The code that makes a model


def test_the_code_of_a_model_with_an_adapter_loads_the_adapter(tmp_path):
    """Even one whose folder is called as a published model."""
    adapter = shutil.copytree(embedded_directory("falconet-instruct"), tmp_path / "falcon-7b")
    assert load_source(fk.load(adapter)).startswith(f"fk.load('{adapter}', ")
    assert load_source(fk.load("falconet-instruct")).startswith("fk.load('falconet-instruct', ")


def test_the_code_of_a_model_in_other_processes_loads_it_by_name(instruct):
    assert load_source(parallel(instruct)).startswith("fk.load('falconet-instruct', ")
    spec = replace(instruct.spec, name="mine", source="/models/mine/config.json")
    assert load_source(parallel(replace(instruct, spec=spec), "/models/mine")).startswith("fk.load('/models/mine', ")


INSTRUCT = str(embedded_directory("falconet-instruct"))


def parallel(falcon, directory=INSTRUCT):
    return fk.ParallelFalcon(
        None, directory, falcon.tokenizer, falcon.spec, falcon.plan, falcon.chat_format, "by default"
    )


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_code_of_an_endpoint_connects_to_all_its_replicas(replicas):
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted(answering(b""))) for _ in range(replicas)]
        urls = [f"{each.address}/v1" for each in servers]
        endpoint = fk.connect(urls)
    given = urls if replicas > 1 else urls[0]
    assert connect_source(endpoint) == f"fk.connect({given!r}, model={endpoint.model!r}, api='openai')"


def test_the_code_of_an_endpoint_below_a_path_connects_in_the_same_protocol(instruct):
    serve = tgi(instruct)
    with scripted(lambda path, *rest: serve(path.removeprefix("/falcon"), *rest)) as server:
        endpoint = fk.connect(f"{server.address}/falcon", api="tgi")
        again = eval(connect_source(endpoint), {"fk": fk})  # noqa: S307  # what a person does with it
        assert again.generate("Hi", max_new_tokens=3).text == endpoint.generate("Hi", max_new_tokens=3).text


@pytest.mark.parametrize("chat", ["baize", fk.ChatFormat("mine", template=BAIZE.template, stop=("!",))])
def test_the_code_of_an_endpoint_connects_with_the_chat_format_that_was_given(chat):
    with scripted(answering(b"")) as server:
        endpoint = fk.connect(f"{server.address}/v1", chat=chat)
        again = eval(connect_source(endpoint), {"fk": fk})  # noqa: S307  # what a person does with it
    assert (again.own_format, again.chat_format) == (True, endpoint.chat_format)


def test_the_code_of_an_endpoint_on_sagemaker_connects_in_the_same_protocol():
    endpoint = fk.connect("sagemaker://falcon", "falcon", session=SageMaker(), api="openai")
    assert connect_source(endpoint) == "fk.connect('sagemaker://falcon', model='falcon', api='openai')"


def test_the_code_of_a_server_of_the_kit_starts_such_a_server_again(instruct):
    with fk.serve("falconet-instruct", "llama.cpp", dtype="q8_0", context=256) as served:
        code, text = connect_source(served), served.generate("Hi", max_new_tokens=3).text
    assert code == "fk.serve('falconet-instruct', 'llama.cpp', dtype='q8_0', context=256)"
    with eval(code, {"fk": fk}) as again:  # noqa: S307  # what a person does with it
        assert again.generate("Hi", max_new_tokens=3).text == text
