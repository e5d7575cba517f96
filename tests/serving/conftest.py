"""Servers for all tests of endpoints, each with Falconet; a server starts once."""

import json

import pytest

import falcon_kit as fk
from falcon_kit.display import temporary
from falcon_kit.serving import protocol, tgi_server
from tests.serving.engine import Engine, make_folder
from tests.serving.servers import (
    Reply,
    container_error,
    llama_cpp,
    part,
    scripted,
    tgi,
    transformers_serve,
)
from tests.serving.vllm import vllm


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts, and no API key in the environment."""
    monkeypatch.setattr(protocol, "FIRST_PAUSE", 0.01)
    for name in ("FALCON_KIT_TOKEN", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A function that makes a stand-in; afterwards no folder of a server is left."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(temporary, "mkdtemp", lambda prefix: make_folder(folders, prefix))
    yield lambda **plan: Engine(tmp_path, **plan)
    assert [*folders.iterdir()] == []


@pytest.fixture(scope="session")
def gguf(instruct, tmp_path_factory):
    return fk.export_gguf(instruct, tmp_path_factory.mktemp("gguf") / "falconet-instruct.gguf")


@pytest.fixture(scope="session")
def llama(gguf):
    server, address = llama_cpp(gguf, n_parallel=2, n_ctx=4096)
    yield fk.connect(address)
    del server


@pytest.fixture(scope="session")
def served(instruct, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "falconet-instruct"
    instruct.model.save_pretrained(directory)
    instruct.tokenizer.save_pretrained(directory)
    with transformers_serve(directory) as address:
        yield fk.connect(address, str(directory))


@pytest.fixture(scope="package")
def tgi_endpoint(instruct):
    with scripted(tgi(instruct)) as server:
        yield fk.connect(server.address)


@pytest.fixture(scope="package")
def vllm_endpoint(instruct):
    with scripted(vllm(instruct)) as server:
        yield fk.connect(f"{server.address}/v1")


@pytest.fixture(scope="package")
def sagemaker_service(instruct):
    """moto's control plane with an endpoint in service, and a runtime that streams TGI's events over it."""
    from moto.server import ThreadedMotoServer

    def runtime(path, body, _):
        assert path == "/endpoints/falcon/invocations-response-stream"
        if wrong := tgi_server.refusal(instruct, body):
            return container_error(422, f"Input validation error: {wrong}")
        lines = b"".join(b"data:" + json.dumps(each).encode() + b"\n\n" for each in tgi_server.events(instruct, body))
        return Reply(
            [part(lines[at : at + 50]) for at in range(0, len(lines), 50)], kind="application/vnd.amazon.eventstream"
        )

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with scripted(runtime) as server, pytest.MonkeyPatch.context() as patch:
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", f"http://{host}:{port}")
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", server.address)
        for name, value in {"REGION": "eu-west-1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.delenv("AWS_DEFAULT_REGION", raising=False)
        deploy("falcon")
        yield server
    moto.stop()


def deploy(name):
    import boto3

    client = boto3.client("sagemaker", region_name="eu-west-1")
    role = "arn:aws:iam::123456789012:role/sagemaker"
    client.create_model(ModelName=name, ExecutionRoleArn=role, PrimaryContainer={"Image": "djl-inference"})
    variant = {"VariantName": "all", "ModelName": name, "InstanceType": "ml.p3.8xlarge", "InitialInstanceCount": 1}
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)


@pytest.fixture(scope="package")
def sagemaker(sagemaker_service):
    return fk.connect("sagemaker://falcon", "falconet-instruct")
