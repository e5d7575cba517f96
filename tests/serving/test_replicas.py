"""Many requests: as many in flight as allowed, in order, on one server or on replicas of it."""

import asyncio
import contextlib
import itertools
import json
import signal
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

import falcon_kit as fk
from falcon_kit.serving.background import wait_for
from falcon_kit.serving.connection import token_from_environment
from falcon_kit.serving.stream import turn
from tests.serving.servers import Reply, answering, as_reply, chunk, scripted

PROMPTS = [f"number {each}" for each in range(30)]


class Busy:
    """A script of a server that counts the requests that it has at once."""

    def __init__(self, wanted=1, failures=None, held=(), **entry):
        """wanted: requests that have to be there before one is answered. failures: responses to prompts, each once.

        held: prompts that are answered after `release` only.
        """
        self.models, self.lock = answering(b"", **entry), threading.Lock()
        self.full, self.release = threading.Event(), threading.Event()
        self.now = self.most = 0
        self.wanted, self.failures, self.held = wanted, dict(failures or {}), held

    def __call__(self, path, body, headers):
        if not path.endswith("completions"):
            return self.models(path, body, headers)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == self.wanted:
                self.full.set()
            text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
            failure = self.failures.pop(text, None)
        self.full.wait(20)
        if text in self.held:
            self.release.wait(20)
        with self.lock:
            self.now -= 1
        return failure or Reply([chunk(f"<{text}>", "stop"), b"data: [DONE]\n\n"])


@contextmanager
def replicas(*scripts):
    """The servers of scripts, and their URLs."""
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted(each)) for each in scripts]
        yield servers, [f"{each.address}/v1" for each in servers]


def ask_at_once(endpoint):
    return endpoint.generate(PROMPTS)


def ask_in_turn(endpoint):
    return list(endpoint.generate_each(PROMPTS))


@pytest.mark.parametrize("ask", [ask_at_once, ask_in_turn])
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_as_many_requests_are_in_flight_as_allowed_and_texts_come_in_order(ask, concurrency):
    script = Busy(concurrency)
    with replicas(script) as (_, urls):
        texts = [each.text for each in ask(fk.connect(urls[0], concurrency=concurrency))]
    assert texts == [f"<{each}>" for each in PROMPTS]
    assert script.most == concurrency


def test_more_than_a_hundred_requests_are_in_flight_at_once():
    script, prompts = Busy(120), [f"number {each}" for each in range(120)]
    with replicas(script) as (_, urls):
        texts = fk.connect(urls[0], concurrency=120, timeout=10).generate(prompts)
    assert (len(texts), script.most) == (120, 120)


def test_replicas_share_the_requests():
    scripts = [Busy(2), Busy(2), Busy(2)]
    with replicas(*scripts) as (servers, urls):
        texts = [each.text for each in fk.connect(urls, concurrency=6).generate_each(PROMPTS)]
        asked = [len(each.asked("/v1/completions")) for each in servers]
    assert texts == [f"<{each}>" for each in PROMPTS]
    assert (sum(asked), min(asked) >= 2) == (30, True)


@pytest.mark.parametrize("status", [429, 503])
def test_a_replica_that_is_busy_is_left_alone_for_as_long_as_it_asks(status):
    reply = as_reply({"error": "busy"}, status, **{"retry-after": "60"})
    scripts = [Busy(failures={"number 0": reply}), Busy()]
    with replicas(*scripts) as (servers, urls):
        texts = [each.text for each in fk.connect(urls, concurrency=1).generate_each(PROMPTS)]
        asked = [len(each.asked("/v1/completions")) for each in servers]
    assert texts == [f"<{each}>" for each in PROMPTS]
    assert asked == [1, 30]


def test_a_request_goes_to_each_replica_before_it_is_given_up():
    busy = as_reply({"error": "busy"}, 429, **{"retry-after": "60"})
    with replicas(answering(busy), answering(busy), Busy()) as (servers, urls):
        assert fk.connect(urls, retries=0).generate("Hi").text == "<Hi>"
        assert [len(each.asked("/v1/completions")) for each in servers] == [1, 1, 1]
        with pytest.raises(ConnectionError, match="busy"):
            fk.connect(urls[:2], retries=0).generate("Hi")


def test_while_all_replicas_rest_a_request_waits_for_the_first_of_them(monkeypatch):
    pauses, sleep = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: (pauses.append(seconds), sleep(0))[1])
    soon, late = (as_reply({"error": "busy"}, 429, **{"retry-after": each}) for each in ("0.5", "60"))
    with replicas(Busy(failures={"Hi": soon}), answering(late)) as (servers, urls):
        assert fk.connect(urls).generate("Hi").text == "<Hi>"
        assert [len(each.asked("/v1/completions")) for each in servers] == [2, 1]
    assert 0 < max(pauses) <= 0.5


def test_the_others_do_the_work_of_a_replica_that_has_ended():
    with replicas(Busy()) as (_, lasting):
        with replicas(Busy()) as (_, ending):
            endpoint = fk.connect([*ending, *lasting], concurrency=4)
        texts = [each.text for each in endpoint.generate_each(PROMPTS)]
    assert texts == [f"<{each}>" for each in PROMPTS]


def test_replicas_of_different_models_are_refused():
    problem = r"has 'falcon' on .* has 'other' on .*: replicas have the same"
    with replicas(Busy(), Busy(models=("other",))) as (_, urls), pytest.raises(ValueError, match=problem):
        fk.connect(urls)


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:9/v1"] * 2])
def test_replicas_have_different_urls(urls):
    with pytest.raises(ValueError, match="give a URL, or different URLs of replicas"):
        fk.connect(urls)


@pytest.mark.parametrize("url", [None, 8000, object(), ["http://127.0.0.1:9/v1", None]])
def test_a_url_of_another_type_is_refused(url):
    with pytest.raises(ValueError, match=r"a URL is a text such as .*; got (NoneType|int|object)"):
        fk.connect(url)


@pytest.mark.parametrize("token", [5, ["first", "second"], b"key"])
def test_a_key_of_another_type_is_refused_without_showing_it(token):
    with pytest.raises(ValueError, match=r"the key of all replicas; got (int|list|bytes)") as error:
        fk.connect(["http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"], token=token)
    assert "first" not in str(error.value)


def test_the_key_of_the_hub_goes_to_no_replica_elsewhere(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    hub = "https://api.huggingface.co/v1"
    assert token_from_environment([hub]) == "hf_secret_of_mine"
    assert token_from_environment([hub, "https://example.com/v1"]) is None


def test_log_probabilities_of_prompts_come_from_all_replicas():
    names = {"tokens": ["Hi", "!"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"!": -1.0}]}
    choice = {"index": 0, "text": "Hi!", "logprobs": names | {"text_offset": [0, 2]}}
    reply = as_reply({"choices": [choice]})
    with replicas(answering(reply, owner="vllm"), answering(reply, owner="vllm")) as (servers, urls):
        found = fk.connect(urls, concurrency=2).prompt_logprobs(["Hi"] * 8)
        asked = [len(each.asked("/v1/completions")) for each in servers]
    assert [[token.text for token in tokens] for tokens in found] == [["Hi"]] * 8
    assert min(asked) > 0


# Texts that come in turn


def test_prompts_without_an_end_are_read_as_they_are_needed():
    script = Busy()
    with replicas(script) as (servers, urls):
        texts = fk.connect(urls[0], concurrency=2).generate_each(f"number {each}" for each in itertools.count())
        first = [next(texts).text for _ in range(5)]
        texts.close()
        asked = len(servers[0].asked("/v1/completions"))
    assert first == [f"<{each}>" for each in PROMPTS[:5]]
    assert asked <= 5 + 2 * 2


def test_what_has_come_before_an_interrupt_is_kept_and_nothing_more_is_sent():
    script, kept = Busy(held=PROMPTS[3:]), []
    with replicas(script) as (servers, urls):
        texts = fk.connect(urls[0], concurrency=4).generate_each(PROMPTS)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(texts):
            for each in texts:
                kept.append(each.text)
                if len(kept) == 3:
                    while script.now < 4:
                        time.sleep(0.01)
                    signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        assert len(servers[0].asked("/v1/completions")) == 3 + 4
        script.release.set()
    assert kept == [f"<{each}>" for each in PROMPTS[:3]]


def test_conversations_are_answered_in_turn():
    with replicas(Busy()) as (servers, urls):
        conversations = [[{"role": "user", "content": each}] for each in PROMPTS]
        texts = [each.text for each in fk.connect(urls[0]).generate_each(conversations)]
        assert len(servers[0].asked("/v1/chat/completions")) == 30
    assert len(texts) == 30


def test_an_error_is_raised_in_the_place_of_its_text():
    refused = as_reply({"error": "no"}, 400)
    with replicas(Busy(1, {"number 5": refused})) as (_, urls):
        texts = fk.connect(urls[0], concurrency=3).generate_each(PROMPTS)
        assert [next(texts).text for _ in range(5)] == [f"<{each}>" for each in PROMPTS[:5]]
        with pytest.raises(ValueError, match="refused the request"):
            next(texts)


def test_a_wrong_setting_is_refused_before_anything_is_sent():
    with replicas(Busy()) as (servers, urls):
        with pytest.raises(ValueError, match="each prompt gives one text"):
            fk.connect(urls[0]).generate_each(PROMPTS, num_return_sequences=2, do_sample=True)
        assert servers[0].asked("/v1/completions") == []


def test_guardrails_hold_for_each_text():
    with replicas(Busy()) as (_, urls):
        texts = fk.connect(urls[0]).generate_each(PROMPTS, guardrails=fk.guardrails(blocked_words=["2"]))
        with pytest.raises(fk.Blocked):
            list(texts)


# Evaluation


def rows(folder):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": each, "answer": f"<{each}>"}) for each in PROMPTS))
    return file


@pytest.mark.parametrize("concurrency", [2, 16])
def test_an_evaluation_has_as_many_requests_in_flight(tmp_path, concurrency):
    script = Busy(concurrency)
    with replicas(script) as (_, urls):
        found = fk.evaluate(fk.connect(urls[0], concurrency=concurrency), rows(tmp_path))
    assert (found["rows"].metrics["exact_match"][0], script.most) == (1.0, concurrency)


@pytest.mark.parametrize(("fails", "expected"), [(False, ["first", "second"]), (True, ["first"])])
def test_a_turn_that_ends_with_an_error_is_given_to_no_other(fails, expected):
    begun = []

    async def request(name, turns):
        async with turn(turns):
            begun.append(name)
            await asyncio.sleep(0)
            if fails:
                raise ValueError("refused")

    async def run():
        turns = asyncio.Semaphore(1)
        tasks = [asyncio.ensure_future(request(name, turns)) for name in ("first", "second")]
        await asyncio.wait(tasks, timeout=0.2)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    wait_for(run())  # in the kit's own loop: tests in a browser leave a running one in this thread
    assert begun == expected


def test_an_evaluation_that_was_broken_off_asks_for_the_rest_only(tmp_path):
    refused = as_reply({"error": "no"}, 400)
    with replicas(Busy(1, {"number 9": refused})) as (servers, urls):
        endpoint, arguments = fk.connect(urls[0], concurrency=1), {"output_dir": tmp_path / "run"}
        with pytest.raises(ValueError, match="refused the request"):
            fk.evaluate(endpoint, rows(tmp_path), **arguments)
        servers[0].requests.clear()
        found = fk.evaluate(endpoint, rows(tmp_path), **arguments)
        asked = [each["prompt"] for each in servers[0].asked("/v1/completions")]
    assert found["rows"].metrics["exact_match"][0] == 1.0
    assert asked == PROMPTS[8:]
