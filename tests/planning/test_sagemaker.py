"""SageMaker's metadata, with stand-ins for its file and for AWS."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import boto3
import moto
import nbformat
import pytest
from botocore.stub import Stubber

from falcon_kit.planning.sagemaker import sagemaker_place

NOTEBOOK = Path(__file__).parents[2] / "notebooks/10_serving.ipynb"
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


def metadata(tmp_path, content):
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    return tmp_path / "metadata.json"


def test_importing_has_no_effect():
    code = "import sys, falcon_kit.planning.sagemaker; print({'boto3', 'torch'} & {*sys.modules})"
    environ = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True).stdout == "set()\n"


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


def test_those_are_arguments_that_aws_takes(tmp_path):
    client = boto3.client("sagemaker", region_name="eu-west-1", aws_access_key_id="a", aws_secret_access_key="b")
    expected = {"DomainId": "d-1a2b3c", "AppType": "JupyterLab", "AppName": "default", "SpaceName": "mine"}
    with Stubber(client) as stub:
        stub.add_response("describe_app", {"ResourceSpec": {"InstanceType": "ml.g5.xlarge"}}, expected)
        assert sagemaker_place(client, {}, metadata(tmp_path, SPACE)).instance == "ml.g5.xlarge"


def test_role_and_instance_of_a_notebook_instance_are_asked_of_aws(tmp_path):
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


def role_in_the_notebook(monkeypatch, tmp_path, content, real):
    """What the cell of notebook 10 that looks for a role and a region finds, with this metadata file."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    place = partial(sagemaker_place, metadata=metadata(tmp_path, content))
    monkeypatch.setattr("falcon_kit.planning.sagemaker.sagemaker_place", place)
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.cell_type == "code" and "sagemaker_place" in cell.source]
    names = {"os": os, "REAL": real}
    exec(source, names)  # noqa: S102  # our own notebook
    return names["role"], names["region"]


@pytest.mark.parametrize(("content", "region"), [(KERNEL, "us-east-2"), (INSTANCE, "eu-west-1")])
def test_the_notebook_takes_the_role_of_the_environment_where_the_file_has_none(monkeypatch, tmp_path, content, region):
    monkeypatch.setenv("SAGEMAKER_ROLE", ROLE)
    assert role_in_the_notebook(monkeypatch, tmp_path, content, real=True) == (ROLE, region)


def test_the_notebook_asks_aws_for_the_role_of_a_notebook_instance(monkeypatch, tmp_path):
    monkeypatch.delenv("SAGEMAKER_ROLE", raising=False)
    with moto.mock_aws():
        client = boto3.client("sagemaker", region_name="eu-west-1")
        client.create_notebook_instance(NotebookInstanceName="mine", InstanceType="ml.p3.8xlarge", RoleArn=ROLE)
        assert role_in_the_notebook(monkeypatch, tmp_path, INSTANCE, real=True) == (ROLE, "eu-west-1")


@pytest.mark.parametrize("content", [SPACE, KERNEL, INSTANCE])
def test_no_account_number_is_shown(tmp_path, content):
    place = sagemaker_place(environ={}, metadata=metadata(tmp_path, content))
    assert "123456789012" not in repr(place) + place._repr_html_()


def test_elsewhere_there_is_no_place_in_sagemaker(tmp_path):
    with pytest.raises(LookupError, match="this is not a SageMaker notebook: there is no"):
        sagemaker_place(metadata=tmp_path / "none.json")


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[1]", "contains a list, .*restart the app")])
def test_a_metadata_file_that_cannot_be_read_is_named(tmp_path, text, words):
    file = tmp_path / "metadata.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"metadata.json.*{words}"):
        sagemaker_place(metadata=file)
