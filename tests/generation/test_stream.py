"""Streams: the text of `generate` piece by piece, computed as far as it is read."""

import gc
import signal
import subprocess
import sys
import threading
import time
from itertools import zip_longest
from weakref import ref

import pytest
import torch

from tests.generation.test_generate import CHAT, PROMPTS, QUESTION, SAMPLED


def long(falcon):
    """A stream of 1000 tokens: random ones, and no end token among them."""
    return falcon.stream(QUESTION, max_new_tokens=1000, temperature=50.0, seed=0, suppress_tokens=[11])


def test_a_stream_computes_in_the_thread_that_reads_it(instruct):
    threads = []
    handle = instruct.model.register_forward_hook(lambda *_: threads.append(threading.current_thread()))
    before = threading.enumerate()
    stream = instruct.stream(QUESTION, max_new_tokens=4)
    next(stream)
    reader = threading.Thread(target=list, args=[stream], daemon=True)
    reader.start()
    reader.join(60)
    handle.remove()
    assert threads == [threading.current_thread(), *[reader] * 3]
    assert [each for each in threading.enumerate() if each not in before] == []


def test_the_reader_of_a_stream_keeps_its_own_modes_of_torch(instruct):
    for _ in instruct.stream(QUESTION, max_new_tokens=3):
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert [torch.is_inference_mode_enabled() for _ in instruct.stream(QUESTION, max_new_tokens=3)] == [True] * 3


def test_streams_side_by_side_write_what_they_write_alone(instruct):
    settings = {"temperature": 2.0, "max_new_tokens": 40}
    alone = [instruct.generate(QUESTION, seed=seed, **settings).text for seed in range(3)]
    streams = [instruct.stream(QUESTION, seed=seed, **settings) for seed in range(3)]
    texts = ["", "", ""]
    for pieces in zip_longest(*streams):  # the three models run at once from their first piece on
        texts = [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_a_stream_gives_the_text_of_generate(instruct):
    pieces = list(instruct.stream(QUESTION, **SAMPLED))
    assert "".join(piece.text for piece in pieces) == instruct.generate(QUESTION, **SAMPLED).text


def test_a_stream_gives_one_piece_per_token(instruct):
    pieces = list(instruct.stream(QUESTION, **SAMPLED))
    answer = instruct.generate(QUESTION, **SAMPLED)
    assert [(piece.token_id, piece.logprob) for piece in pieces] == list(
        zip(answer.tokens, answer.logprobs, strict=True)
    )


def test_an_ended_stream_has_the_whole_generation(instruct):
    answers = instruct.stream(QUESTION)
    text = "".join(piece.text for piece in answers)
    assert (answers.generation.text, answers.generation.finish_reason) == (text, "eos")


def test_a_running_stream_has_no_generation_yet(instruct):
    answers = instruct.stream(QUESTION)
    next(answers)
    with pytest.raises(RuntimeError, match="has not ended yet: iterate over it to the end, or close"):
        answers.generation  # noqa: B018


def test_closing_a_stream_stops_the_model_at_the_next_token(instruct, forwards):
    answers = long(instruct)
    seen = [next(answers), next(answers)]
    answers.close()
    assert len(forwards) == len(seen)


def test_a_stream_that_nobody_reads_waits(instruct, forwards):
    answers = long(instruct)
    seen = [next(answers), next(answers)]
    time.sleep(0.1)  # a free model would have run on
    assert len(forwards) == len(seen)
    answers.close()


def test_the_end_of_a_with_block_closes_a_stream(instruct, forwards):
    with long(instruct) as answers:
        seen = [next(answers), next(answers)]
    assert [piece.token_id for piece in seen] == list(answers.generation.tokens)
    assert len(forwards) == len(seen)


def test_a_closed_stream_has_the_text_so_far(instruct):
    answers = long(instruct)
    first = next(answers)
    answers.close()
    assert (answers.generation.finish_reason, answers.generation.tokens[0]) == ("cancelled", first.token_id)


def test_a_stream_can_be_closed_while_another_thread_waits_for_its_next_piece(instruct):
    waits, read = threading.Event(), []
    handle = instruct.model.register_forward_hook(lambda *_: waits.set() or time.sleep(0.05))
    answers = long(instruct)
    reader = threading.Thread(target=lambda: read.extend(answers), daemon=True)
    reader.start()
    assert waits.wait(60)
    answers.close()
    reader.join(60)
    handle.remove()
    assert (answers.generation.finish_reason, len(read) < 500) == ("cancelled", True)


def test_leaving_the_loop_frees_what_the_stream_held(instruct):
    caches = []
    handle = instruct.model.register_forward_hook(lambda _, __, output: caches.append(ref(output.past_key_values)))
    for _ in long(instruct):
        break
    handle.remove()
    gc.collect()
    assert [each() for each in caches] == [None]


def interrupt_while_reading(pieces):
    for _ in pieces:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_the_model_and_leaves_it_usable(instruct):
    expected = instruct.generate(QUESTION).text
    with pytest.raises(KeyboardInterrupt):
        interrupt_while_reading(long(instruct))
    assert instruct.generate(QUESTION).text == expected


def test_ctrl_c_inside_the_model_keeps_the_text_so_far(instruct):
    stream = long(instruct)
    first = next(stream)
    handle = instruct.model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    handle.remove()
    assert (stream.generation.tokens, stream.generation.finish_reason) == ((first.token_id,), "cancelled")
    assert list(stream) == []


def test_a_program_that_was_interrupted_in_a_stream_ends_while_a_thread_of_it_reads_another():
    program = """
import signal
import threading
import time
import falcon_kit as fk
falcon, long = fk.load(), {"max_new_tokens": 1000, "temperature": 50.0, "suppress_tokens": [11]}
try:
    for piece in falcon.stream("Hello", **long):
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
pieces = falcon.stream("Hello", **long)
begun = threading.Event()
pieces._task.model.register_forward_hook(lambda *_: begun.set() or time.sleep(0.2))
threading.Thread(target=list, args=[pieces], daemon=True).start()
begun.wait()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (ended.stdout, ended.stderr) == ("interrupted\n", "")


def test_an_error_in_the_model_reaches_whoever_reads_the_stream(instruct):
    def fail(*_):
        raise MemoryError("no room")

    handle = instruct.model.register_forward_hook(fail)
    try:
        with pytest.raises(MemoryError, match="no room"):
            list(instruct.stream(QUESTION))
    finally:
        handle.remove()


def test_a_stream_has_the_text_until_an_error(instruct):
    stream = instruct.stream(QUESTION)
    first = next(stream)
    handle = instruct.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    handle.remove()
    stream.close()
    assert (stream.generation.tokens, stream.generation.finish_reason) == ((first.token_id,), "broken")


def test_the_time_of_the_reader_is_not_that_of_the_model(instruct):
    begin, stream = time.perf_counter(), instruct.stream(QUESTION, max_new_tokens=3)
    reading = 0.0
    for _ in stream:
        start = time.perf_counter()
        time.sleep(0.1)
        reading += time.perf_counter() - start
    without = time.perf_counter() - begin - reading
    assert 0 < stream.generation.stats.first_token_seconds < stream.generation.stats.seconds < without


@pytest.mark.parametrize(("prompt", "settings"), [(PROMPTS, {}), (QUESTION, {"num_return_sequences": 2, "top_k": 5})])
def test_a_stream_of_several_texts_is_refused(instruct, prompt, settings):
    with pytest.raises(ValueError, match="a stream carries one text: give one prompt"):
        instruct.stream(prompt, **settings)


def test_a_stream_of_a_beam_search_is_refused(instruct):
    with pytest.raises(ValueError, match="beam search cannot stream token by token"):
        instruct.stream(QUESTION, num_beams=2)


def test_a_conversation_streams_what_chat_answers(instruct):
    assert "".join(piece.text for piece in instruct.stream(CHAT)) == instruct.chat(CHAT).text


def test_a_stream_hands_alternatives_over_with_each_piece(instruct):
    stream = instruct.stream(QUESTION, max_new_tokens=4, alternatives=2)
    pieces = [piece.alternatives for piece in stream]
    assert tuple(pieces) == stream.generation.alternatives
    assert {len(each) for each in pieces} == {2}
