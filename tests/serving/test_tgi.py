"""What TGI is sent, and how its events and those of LMI's containers are read."""

import json
import math
import threading

import pytest

import falcon_kit as fk
from falcon_kit.serving import stream
from falcon_kit.serving.tgi import read_event
from falcon_kit.serving.tgi_server import TgiServer
from tests.serving.servers import QUESTION, as_reply, event, scripted, tgi

EVENT = {"token": {"id": 5, "text": " a", "logprob": -0.1, "special": False}}


def test_stop_strings_beyond_tgis_four_end_a_text_too(tgi_endpoint, instruct):
    stop = ["zebra", "owl", "[", "]", "!"]
    local = instruct.generate("Wow", max_new_tokens=40, stop=stop)
    remote = tgi_endpoint.generate("Wow", max_new_tokens=40, stop=stop)
    assert (remote.text, remote.finish_reason) == (local.text, local.finish_reason)


def test_a_stop_string_that_tgi_was_not_sent_ends_a_text_at_once(monkeypatch):
    monkeypatch.setattr(stream, "END_SECONDS", 60)
    returned, in_time = threading.Event(), []

    def going_on():
        yield event(EVENT)
        in_time.append(returned.wait(10))

    with scripted(lambda path, *_: as_reply({"model_id": "falcon"}) if path == "/info" else going_on()) as server:
        answer = fk.connect(server.address).generate("Hi", stop=["1", "2", "3", "4", "a"])
        returned.set()
    assert (answer.text, answer.finish_reason, in_time) == (" ", "stop", [True])


def test_only_the_settings_that_were_given_are_sent(instruct):
    with scripted(tgi(instruct)) as server:
        fk.connect(server.address).generate("Hi", temperature=0.5, top_p=1.0, max_new_tokens=3)
        (body,) = server.asked("/generate_stream")
    expected = {"max_new_tokens": 3, "details": True, "return_full_text": False, "stop": [], "do_sample": True}
    assert body == {"inputs": "Hi", "parameters": expected | {"temperature": 0.5}}


@pytest.mark.parametrize("name", ["logprob", "log_prob"])
def test_the_log_probability_has_either_name(name):
    token = {"id": 5, "text": " a", name: -0.1, "special": False}
    assert read_event(json.dumps({"token": token}), "local").logprob == -0.1


def test_a_missing_log_probability_is_nan():
    assert math.isnan(read_event(json.dumps({"token": {"id": 5, "text": " a", "special": False}}), "local").logprob)


def test_a_special_token_has_no_text():
    assert read_event(json.dumps({"token": EVENT["token"] | {"special": True}}), "local").text == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<html>", "local sent a line that is no event of TGI: '<html>'"),
        ('{"error": "out of memory", "error_type": "generation"}', "local reports: out of memory"),
    ],
)
def test_a_line_that_is_no_event_is_an_error(line, message):
    with pytest.raises(ConnectionError, match=message):
        read_event(line, "local")


# The server on loopback


def test_the_server_of_the_kit_streams_the_local_text_and_frees_its_port(instruct):
    with TgiServer(instruct) as server:
        served = fk.connect(server.address)
        assert served.chat(QUESTION).text == instruct.chat(QUESTION).text
        with pytest.raises(ValueError, match="2048"):
            served.generate("word " * 3000, max_new_tokens=5)
    with pytest.raises(ConnectionError, match="nothing answers"):
        fk.connect(server.address, retries=0)


def test_the_server_of_the_kit_prints_nothing_when_a_client_hangs_up(instruct, capfd):
    before = {*threading.enumerate()}
    with TgiServer(instruct) as server:
        stream = fk.connect(server.address).stream("Once upon a time", max_new_tokens=1900, temperature=1.0)
        next(stream)
        answering = [each for each in threading.enumerate() if "process_request" in each.name and each not in before]
        stream.close()
        for each in answering:
            each.join(20)
    assert answering
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"typical_p": 0.2, "do_sample": True, "seed": 1}])
def test_the_server_of_the_kit_ignores_no_setting(tgi_endpoint, instruct, settings):
    local, remote = (each.generate("The giraffe", max_new_tokens=12, **settings) for each in (instruct, tgi_endpoint))
    assert remote.text == local.text


def test_the_server_of_the_kit_refuses_typical_p_without_sampling(tgi_endpoint):
    with pytest.raises(ValueError, match=r"refused the request .*`typical_p` needs `do_sample`"):
        tgi_endpoint.generate("Wow", typical_p=0.2)
