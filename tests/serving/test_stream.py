"""A response while it is received: closing it, responses that break, and where a text is cut."""

import asyncio
import gc
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.text import cut
from falcon_kit.serving import background
from falcon_kit.serving import stream as remote
from falcon_kit.serving.background import background_loop, wait_for
from falcon_kit.serving.protocol import Delta, lines_of
from falcon_kit.serving.stream import Answer
from tests.serving.servers import Reply, answering, chunk, event, scripted
from tests.waiting import interrupted, until

# Closing


@pytest.fixture
def endless():
    """A server that never comes to an end."""
    with scripted(answering(iter(lambda: (time.sleep(0.01), chunk(" word"))[1], None))) as server:
        yield server


@pytest.mark.parametrize("guardrails", [None, fk.guardrails()], ids=["plain", "guarded"])
def test_the_end_of_a_with_block_closes_the_connection(endless, guardrails):
    with fk.connect(f"{endless.address}/v1").stream("Hello", guardrails=guardrails) as stream:
        next(stream)
    assert endless.hung_up.wait(5)
    assert stream.generation.finish_reason == "cancelled"


def test_closing_a_stream_closes_the_connection(endless):
    stream = fk.connect(f"{endless.address}/v1").stream("Hello")
    next(stream)
    stream.close()
    assert endless.hung_up.wait(5)
    assert stream.generation.finish_reason == "cancelled"
    assert list(stream) == []


def test_a_stream_that_is_dropped_closes_the_connection(endless):
    stream = fk.connect(f"{endless.address}/v1").stream("Hello")
    next(stream)
    del stream
    gc.collect()
    assert endless.hung_up.wait(5)


def test_a_stream_that_the_thread_of_the_connections_finds_as_garbage_holds_up_no_other(endless):
    stream = fk.connect(f"{endless.address}/v1").stream("Hello", guardrails=fk.guardrails())
    next(stream)
    stream.cycle = stream
    gc.collect()
    del stream

    async def collect():
        gc.collect()

    asyncio.run_coroutine_threadsafe(collect(), background_loop()).result(10)
    assert endless.hung_up.wait(5)


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_ctrl_c_closes_the_connection(endless, how):
    endpoint = fk.connect(f"{endless.address}/v1")
    with interrupted(0.5):
        list(getattr(endpoint, how)("Hi"))
    assert endless.hung_up.wait(5)


def test_ctrl_c_while_a_stream_begins_closes_the_connection(endless, monkeypatch):
    endpoint = fk.connect(f"{endless.address}/v1")

    def too_late(future):
        future.result(10)
        until(lambda: endless.asked("/v1/completions"))
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "result", too_late)
    with pytest.raises(KeyboardInterrupt):
        endpoint.stream("Hi")
    assert endless.hung_up.wait(5)


LEFT_OPEN = {
    "a stream": "stream = endpoint.stream('Hi')",
    "a guarded stream": "stream = endpoint.stream('Hi', guardrails=fk.guardrails())",
    "many prompts": "stream = endpoint.generate_each(['short', 'endless', 'endless'])",
}


def run(code, address):
    """What a program prints that has an endpoint."""
    code = f"import falcon_kit as fk; endpoint = fk.connect({address + '/v1'!r}, concurrency=1)\n{code}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.parametrize("how", LEFT_OPEN)
def test_an_interpreter_that_ends_does_not_wait_for_what_is_left_open(endless, how):
    goes_on, ends = endless.script, answering(Reply([chunk("Hello", "stop")]))
    endless.script = lambda path, body, *rest: (ends if body.get("prompt") == "short" else goes_on)(path, body, *rest)
    assert run(f"{LEFT_OPEN[how]}; print(next(stream).text)", endless.address).strip() in ("Hello", "word")


FORK = """
import gc, multiprocessing
stream = endpoint.stream("Hi", guardrails=fk.guardrails())
next(stream)
stream.cycle = stream

def ask():
    global stream
    del stream
    gc.collect()  # closes the parent's stream, for which the child has no thread
    print(endpoint.generate("Hi").text, flush=True)

child = multiprocessing.get_context("fork").Process(target=ask, daemon=True)
child.start()
child.join(20)
print(child.exitcode)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")
def test_an_endpoint_works_in_a_fork():
    with scripted(answering(Reply([chunk("Hello"), chunk(" there", "stop")]))) as server:
        assert run(FORK, server.address) == "Hello there\n0\n"


def test_closing_a_stream_frees_llama_cpp(llama):
    stream = llama.stream("Once upon a time", max_new_tokens=1900, temperature=1.0)
    next(stream)
    stream.close()
    assert is_idle(llama)


def is_idle(llama):
    """Whether llama.cpp ends all work within a second."""
    for _ in range(20):
        slots = httpx2.get(f"{llama.address.removesuffix('/v1')}/slots").json()
        if not any(slot["is_processing"] for slot in slots):
            return True
        time.sleep(0.05)
    return False


def test_a_stream_can_be_closed_by_another_thread_before_its_first_piece():
    with scripted(answering(Reply([chunk("late")] * 2, silence=20))) as server:
        stream = fk.connect(f"{server.address}/v1").stream("Hello")
        threading.Timer(0.2, stream.close).start()
        start = time.perf_counter()
        assert list(stream) == []
        assert time.perf_counter() - start < 5
        assert stream.generation.text == ""


def test_a_stream_ends_for_each_thread_that_reads_it():
    with scripted(answering(Reply([chunk("a"), chunk("b"), chunk("c", "stop")]))) as server:
        stream, read = fk.connect(f"{server.address}/v1").stream("Hi"), []
        readers = [threading.Thread(target=lambda: read.append(list(stream)), daemon=True) for _ in range(3)]
        for each in readers:
            each.start()
        for each in readers:
            each.join(10)
    assert sorted(piece.text for pieces in read for piece in pieces) == ["a", "b", "c"]
    assert len(read) == 3


def test_threads_that_ask_first_at_once_get_the_same_loop(monkeypatch):
    monkeypatch.setattr(background, "_LOOPS", {})
    new_loop, made = asyncio.new_event_loop, []
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: (time.sleep(0.2), made.append(new_loop()), made[-1])[-1])
    threads = [threading.Thread(target=background_loop) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(10)
    assert made == [background_loop()]


def test_a_stop_string_hangs_up_on_a_server_that_would_go_on(endless):
    answer = fk.connect(f"{endless.address}/v1").generate("Hello", stop="word word")
    assert (answer.text, answer.finish_reason) == (" ", "stop")
    assert endless.hung_up.wait(5)


def test_a_stream_has_no_generation_before_it_ends(llama):
    stream = llama.stream("Once", max_new_tokens=1900, temperature=1.0)
    with pytest.raises(RuntimeError, match="not ended yet"):
        _ = stream.generation
    stream.close()


# Responses that break


BREAKS = {
    "connection cut": Reply([chunk("Half a"), chunk(" sentence")], cut=True),
    "connection reset": Reply([chunk("Half a"), chunk(" sentence")], cut=True, reset=True),
    "error in the stream": Reply([chunk("Half a"), chunk(" sentence"), event({"error": {"message": "out of memory"}})]),
    "refusal in the stream": Reply(
        [chunk("Half a"), chunk(" sentence"), event({"error": {"message": "", "code": 400}})]
    ),
    "end without a reason": Reply([chunk("Half a"), chunk(" sentence")]),
    "not JSON": Reply([chunk("Half a"), chunk(" sentence"), b"data: {broken\n\n"]),
}


@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in BREAKS.items()])
def test_an_answer_that_breaks_off_keeps_its_text_and_is_not_begun_again(reply):
    with scripted(answering(reply)) as server:
        stream = fk.connect(f"{server.address}/v1").stream("Hi")
        shown: list[str] = []
        with pytest.raises(fk.IncompleteAnswer, match=r"broke off after 15|no finish reason after 15") as broken:
            shown.extend(piece.text for piece in stream)
        assert "".join(shown) == "Half a sentence"
        assert (broken.value.generation.text, broken.value.generation.finish_reason) == ("Half a sentence", "broken")
        assert stream.generation.finish_reason == "broken"
        assert len(server.asked("/v1/completions")) == 1


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter"])
def test_a_text_that_the_server_gave_up_is_incomplete(reason):
    script = answering(Reply([chunk("Half a"), chunk(" sentence", reason)]))
    message = f"ended it for the reason '{reason}'"
    with scripted(script) as server, pytest.raises(fk.IncompleteAnswer, match=message) as broken:
        fk.connect(f"{server.address}/v1").generate("Hi")
    assert (broken.value.generation.text, broken.value.generation.finish_reason) == ("Half a sentence", "broken")


def test_a_text_that_breaks_off_is_kept_without_a_stream_too():
    with scripted(answering(BREAKS["connection cut"])) as server:
        with pytest.raises(fk.IncompleteAnswer, match=r"broke \(\w+\): read the server's log$") as broken:
            fk.connect(f"{server.address}/v1").generate("Hi")
        assert broken.value.generation.text == "Half a sentence"


def test_a_server_that_falls_silent_in_the_middle_breaks_off():
    def halting():
        yield chunk("Half")
        time.sleep(3)

    with scripted(answering(halting())) as server:
        with pytest.raises(fk.IncompleteAnswer, match="sent nothing for") as broken:
            fk.connect(f"{server.address}/v1", timeout=0.3).generate("Hi")
        assert broken.value.generation.text == "Half"


def test_a_text_beyond_the_context_is_kept_with_the_error():
    usage = {"prompt_tokens": 2047, "completion_tokens": 2}
    script = answering(Reply([chunk("Hello"), chunk(" there", "stop", usage=usage)]))
    with scripted(script) as server:
        endpoint = fk.connect(f"{server.address}/v1", context=2048)
        stream = endpoint.stream("Hi")
        for call in (lambda: endpoint.generate("Hi"), stream.wait):
            with pytest.raises(ValueError, match="have 2049 tokens, and text beyond the model's context of") as beyond:
                call()
            assert (beyond.value.generation.text, beyond.value.generation.finish_reason) == ("Hello there", "eos")
        assert stream.generation.text == "Hello there"


# Chunks


@given(
    text=st.text("ab", min_size=1, max_size=12),  # few letters, so that most texts contain most stop strings
    size=st.integers(1, 3),
    stop=st.lists(st.text("ab", min_size=2, max_size=4), max_size=2),
)
def test_wherever_chunks_end_the_text_is_cut_at_the_same_place(text, size, stop):
    answer, shown = Answer("", tuple(stop), strip=False), ""
    for start in range(0, len(text), size):
        piece = answer.push(Delta(text[start : start + size], finish="eos" if start + size >= len(text) else None))
        shown += piece.text if piece else ""
        if answer.finish:
            break
    expected, stopped = cut(text, tuple(stop))
    assert (answer.text, shown, answer.finish) == (expected, expected, "stop" if stopped else "eos")


LINES = st.lists(st.text("ab\x0b\x0c\x85\u2028\u2029", min_size=1, max_size=4), min_size=1, max_size=5)


@given(lines=LINES, end=st.sampled_from(["\n", "\r", "\r\n"]), size=st.integers(1, 4))
def test_wherever_a_response_is_cut_its_lines_end_at_cr_and_lf_alone(lines, end, size):
    content = end.join(lines).encode()

    async def parts():
        for start in range(0, len(content), size):
            yield content[start : start + size]

    async def collect():
        return [line.decode() async for line in lines_of(parts()) if line]

    assert wait_for(collect()) == lines
