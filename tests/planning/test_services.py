"""Secrets, widgets and SageMaker's metadata, with stand-ins for the modules and files of each service."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from falcon_kit.planning.services import enable_widgets, sagemaker_place, secret

COLAB, KAGGLE = {"COLAB_RELEASE_TAG": "release-colab"}, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
ROLE = "arn:aws:iam::123456789012:role/service-role/AmazonSageMaker-ExecutionRole"
SPACE = {  # the metadata file of a JupyterLab space in Studio
    "AppType": "JupyterLab",
    "DomainId": "d-1a2b3c",
    "SpaceName": "mine",
    "UserProfileName": "",
    "ExecutionRoleArn": ROLE,
    "ResourceArn": "arn:aws:sagemaker:eu-west-1:123456789012:app/d-1a2b3c/mine/JupyterLab/default",
    "ResourceName": "default",
    "AppImageVersion": "",
}
KERNEL = {  # of a kernel in Studio Classic, as the documentation prints it
    "AppType": "KernelGateway",
    "DomainId": "d-xxxxxxxxxx",
    "UserProfileName": "profile-name",
    "ResourceArn": "arn:aws:sagemaker:us-east-2:account-id:app/d-xxxxxxxxxx/profile-name/KernelGateway/datascience",
    "ResourceName": "datascience--1-0-ml-g5-12xlarge-1abf3407f667f989be9d86559395",
    "AppImageVersion": "",
}
INSTANCE = {"ResourceArn": "arn:aws:sagemaker:eu-west-1:123456789012:notebook-instance/mine", "ResourceName": "mine"}


class NotThere(Exception):
    """Stands for the exceptions of both services' clients."""


class NotGranted(Exception):
    """The same."""


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture
def colab(monkeypatch):
    """google.colab as it is in Colab: a secret, one that is not granted, and a switch for widgets."""

    def get(name):
        if name == "HIDDEN":
            raise NotGranted(name)
        if name != "TOKEN":
            raise NotThere(name)
        return "value-of-token"

    switched = []
    userdata = module("google.colab.userdata", get=get, SecretNotFoundError=NotThere, NotebookAccessError=NotGranted)
    output = module("google.colab.output", enable_custom_widget_manager=lambda: switched.append("on"))
    for each in (module("google"), module("google.colab"), userdata, output):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return switched


@pytest.fixture
def kaggle(monkeypatch):
    """kaggle_secrets as it is in Kaggle."""

    class UserSecretsClient:
        def get_secret(self, name):
            if name != "TOKEN":
                raise NotThere(name)
            return "value-of-token"

    monkeypatch.setitem(sys.modules, "kaggle_secrets", module("kaggle_secrets", UserSecretsClient=UserSecretsClient))


def metadata(tmp_path, content):
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    return tmp_path / "metadata.json"


# Secrets


@pytest.mark.parametrize("environ", [{}, COLAB, KAGGLE])
def test_the_environment_comes_first_everywhere(colab, kaggle, environ):
    assert secret("TOKEN", {**environ, "TOKEN": "mine"}) == "mine"


def test_colabs_secrets_are_read(colab):
    assert secret("TOKEN", COLAB) == "value-of-token"


def test_kaggles_secrets_are_read(kaggle):
    assert secret("TOKEN", KAGGLE) == "value-of-token"


@pytest.mark.parametrize(
    ("environ", "name", "where"),
    [
        (COLAB, "NONE", "no secret NONE in Colab: add NONE under Secrets .the key in the left bar. and grant access"),
        (COLAB, "HIDDEN", "grant access to it"),
        (KAGGLE, "NONE", "no secret NONE in Kaggle: add NONE under Add-ons, Secrets, and attach it"),
    ],
)
def test_a_missing_secret_says_where_to_put_it(colab, kaggle, environ, name, where):
    with pytest.raises(LookupError, match=where):
        secret(name, environ)


def test_elsewhere_a_missing_secret_is_a_variable_to_set():
    with pytest.raises(LookupError, match="set the environment variable NONE before Jupyter starts"):
        secret("NONE", {})


# Widgets


def test_colabs_widget_manager_is_switched_on_when_asked(colab):
    assert enable_widgets(COLAB)
    assert colab == ["on"]


@pytest.mark.parametrize("environ", [{}, KAGGLE, {"VSCODE_PID": "7"}, {"SAGEMAKER_APP_TYPE": "JupyterLab"}])
def test_no_other_service_has_anything_to_switch_on(environ):
    assert not enable_widgets(environ)


def test_importing_has_no_effect():
    code = (
        "import sys, falcon_kit.planning.services; "
        "print({'google.colab', 'kaggle_secrets', 'boto3', 'torch'} & {*sys.modules})"
    )
    environ = {"COLAB_RELEASE_TAG": "x", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True).stdout == "set()\n"


# SageMaker


def test_a_studio_space_tells_its_role_and_region(tmp_path):
    place = sagemaker_place(environ={}, metadata=metadata(tmp_path, SPACE))
    assert (place.app, place.region, place.role, place.instance) == ("JupyterLab", "eu-west-1", ROLE, None)


def test_a_kernel_of_studio_classic_tells_its_instance_and_so_its_gpus(tmp_path):
    place = sagemaker_place(environ={}, metadata=metadata(tmp_path, KERNEL))
    assert (place.region, place.instance, place.gpus) == ("us-east-2", "ml.g5.12xlarge", (4, "A10G"))


def test_the_instance_of_a_space_is_asked_of_aws(tmp_path):
    asked = []

    def describe_app(**arguments):
        asked.append(arguments)
        return {"ResourceSpec": {"InstanceType": "ml.g6e.12xlarge"}}

    place = sagemaker_place(SimpleNamespace(describe_app=describe_app), {}, metadata(tmp_path, SPACE))
    expected = {"DomainId": "d-1a2b3c", "AppType": "JupyterLab", "AppName": "default", "SpaceName": "mine"}
    assert (asked, place.instance, place.gpus) == ([expected], "ml.g6e.12xlarge", (4, "L40S"))


def test_those_are_arguments_that_aws_takes():
    boto3 = pytest.importorskip("boto3")
    from botocore.stub import Stubber

    client = boto3.client("sagemaker", region_name="eu-west-1", aws_access_key_id="a", aws_secret_access_key="b")
    expected = {"DomainId": "d-1", "AppType": "JupyterLab", "AppName": "default", "SpaceName": "mine"}
    with Stubber(client) as stub:
        stub.add_response("describe_app", {"ResourceSpec": {"InstanceType": "ml.g5.xlarge"}}, expected)
        assert client.describe_app(**expected)["ResourceSpec"]["InstanceType"] == "ml.g5.xlarge"


def test_role_and_instance_of_a_notebook_instance_are_asked_of_aws(tmp_path):
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    with moto.mock_aws():
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        client = boto3.client("sagemaker", region_name="eu-west-1", **keys)
        client.create_notebook_instance(NotebookInstanceName="mine", InstanceType="ml.p3.8xlarge", RoleArn=ROLE)
        place = sagemaker_place(client, {}, metadata(tmp_path, INSTANCE))
    assert (place.app, place.role, place.instance) == ("notebook instance", ROLE, "ml.p3.8xlarge")
    assert place.gpus == (4, "V100-16GB")


def test_the_region_of_the_environment_counts(tmp_path):
    assert (
        sagemaker_place(environ={"AWS_REGION": "us-west-2"}, metadata=metadata(tmp_path, SPACE)).region == "us-west-2"
    )


@pytest.mark.parametrize("content", [SPACE, KERNEL, INSTANCE])
def test_no_account_number_is_shown(tmp_path, content):
    place = sagemaker_place(environ={}, metadata=metadata(tmp_path, content))
    assert "123456789012" not in repr(place) + place._repr_html_()


def test_elsewhere_there_is_no_place_in_sagemaker(tmp_path):
    with pytest.raises(LookupError, match="this is not a SageMaker notebook: there is no"):
        sagemaker_place(metadata=tmp_path / "none.json")
