"""SageMaker endpoints: moto's control plane, and a runtime that streams a container's events."""

import sys
import threading
import time
from unittest.mock import Mock

import boto3
import pytest

import falcon_kit as fk
from falcon_kit.serving import sagemaker
from tests.serving.servers import DONE, QUESTION, Reply, as_reply, chunk, container_error, event, frame, part
from tests.serving.test_malformed import SageMaker


def test_a_sagemaker_endpoint_that_is_not_there_is_a_lookup_error(sagemaker_service):
    with pytest.raises(LookupError, match="sagemaker://nobody is not in this region: check name and region"):
        fk.connect("sagemaker://nobody")


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        ("Failed", ConnectionError, "sagemaker://falcon has failed: the image is too large"),
        ("Creating", ConnectionError, "sagemaker://falcon is Creating: wait until it is InService"),
    ],
)
def test_an_endpoint_that_is_not_in_service_says_why(monkeypatch, status, kind, message):
    client = boto3.client("sagemaker", "eu-west-1")
    described = {"EndpointStatus": status, "FailureReason": "the image is too large"}
    monkeypatch.setattr(client, "describe_endpoint", lambda **_: described)
    with pytest.raises(kind, match=message):
        fk.connect("sagemaker://falcon", session=Mock(client=lambda *_, **__: client))


def test_credentials_that_are_refused_are_a_permission_error(sagemaker_service, monkeypatch):
    expired = {"x-amzn-errortype": "ExpiredTokenException"}
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: as_reply({"Message": "expired"}, 403, **expired))
    with pytest.raises(
        PermissionError, match=r"AWS refuses these credentials for sagemaker://falcon: check role.*expired"
    ):
        fk.connect("sagemaker://falcon").generate("Hi")


def test_sagemaker_without_a_region_says_how_to_set_one(monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no AWS region is set: set AWS_REGION, or pass session=boto3.Session"):
        fk.connect("sagemaker://falcon")


def test_a_container_that_refuses_is_quoted(sagemaker_service, monkeypatch):
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: container_error(422, "too many tokens"))
    with pytest.raises(ValueError, match=r"refused the request .HTTP 422.*reports: too many tokens"):
        fk.connect("sagemaker://falcon").generate("Hi")


BUSY = as_reply({"Message": "slow down"}, 429, **{"x-amzn-errortype": "ThrottlingException"})


@pytest.mark.parametrize("busy", [BUSY, Reply(dropped=True), Reply(dropped=True, reset=True)])
def test_a_sagemaker_endpoint_that_is_busy_or_hangs_up_is_asked_again(sagemaker_service, monkeypatch, busy):
    replies, script = [busy, busy], sagemaker_service.script
    monkeypatch.setattr(sagemaker_service, "script", lambda *all: replies.pop() if replies else script(*all))
    assert fk.connect("sagemaker://falcon").generate("Once", max_new_tokens=3).stats.new_tokens == 3


def test_a_sagemaker_answer_that_breaks_off_keeps_its_text(sagemaker_service, monkeypatch):
    half = part(b'data:{"token":{"id":5,"text":"Half","logprob":-0.1,"special":false}}\n\n')
    failed = frame(b'{"Message": "worker died"}', message_type="exception", exception_type="ModelStreamError")
    reply = Reply([half, failed], kind="application/vnd.amazon.eventstream")
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: reply)
    with pytest.raises(fk.IncompleteAnswer, match="worker died") as broken:
        fk.connect("sagemaker://falcon").generate("Hi")
    assert broken.value.generation.text == "Half"


@pytest.mark.parametrize("line", ["", ":keep-alive", "event: message", "data: [DONE]"])
def test_a_line_without_an_event_is_skipped(line):
    assert sagemaker.data_of(line) == ""


def test_an_event_is_in_a_line_of_json_or_of_server_sent_events():
    assert sagemaker.data_of('{"token": {}}') == sagemaker.data_of('data:{"token": {}}') == '{"token": {}}'


def test_a_sagemaker_response_that_is_slow_to_close_holds_up_nothing(sagemaker_service, monkeypatch):
    closing, closed = threading.Event(), threading.Event()
    monkeypatch.setattr(sagemaker, "_close", lambda _: (closing.set(), closed.wait(20)))
    fk.connect("sagemaker://falcon").generate("Once", max_new_tokens=3)
    assert closing.wait(5)
    started = time.monotonic()
    assert fk.connect("sagemaker://falcon").generate("Once", max_new_tokens=3).stats.new_tokens == 3
    assert time.monotonic() - started < 10  # closing takes twenty seconds
    closed.set()


def test_a_vllm_container_on_sagemaker_speaks_openai(sagemaker_service, monkeypatch):
    reply = Reply([part(b"".join(DONE)[:30]), part(b"".join(DONE)[30:])], kind="application/vnd.amazon.eventstream")
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: reply)
    assert fk.connect("sagemaker://falcon", api="openai").chat(QUESTION).text == "Hello there"
    assert sagemaker_service.requests[-1][1]["messages"] == QUESTION


@pytest.mark.parametrize(
    ("events", "error", "message"),
    [
        ([event({"error": {"message": "20 are the most", "code": 400}})], ValueError, r"\(HTTP 400\).*20 are the most"),
        (
            [chunk("Half"), event({"error": {"message": "out of memory"}})],
            fk.IncompleteAnswer,
            "reports: out of memory",
        ),
    ],
)
def test_an_error_of_a_vllm_container_is_quoted(events, error, message):
    session = SageMaker()
    session.body = b"".join(events)
    endpoint = fk.connect("sagemaker://falcon", "falcon", session=session, api="openai")
    with pytest.raises(error, match=message):
        endpoint.generate("Hi")


def test_boto3_is_asked_for_by_the_name_of_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ModuleNotFoundError, match="need boto3: pip install boto3"):
        fk.connect("sagemaker://falcon")
