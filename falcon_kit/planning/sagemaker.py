"""The SageMaker app of this notebook: its region, execution role, instance type and GPUs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_kit.display.reading import read_json
from falcon_kit.display.tables import html_table
from falcon_kit.planning.machines import MACHINES
from falcon_kit.planning.places import SAGEMAKER_FILE


@dataclass(frozen=True, repr=False)
class SageMakerPlace:
    """The SageMaker app of this notebook; a table in Jupyter. Texts and tables do not show account numbers."""

    app: str
    """"JupyterLab", "CodeEditor", "KernelGateway", ..., or "notebook instance"."""
    region: str | None
    """The region, such as "eu-west-1"."""
    role: str | None
    """ARN of the execution role, which a deployment needs; None if neither the metadata nor AWS returns it."""
    instance: str | None
    """The instance type, such as "ml.g5.12xlarge"; None if neither the metadata nor AWS returns it."""

    @property
    def gpus(self) -> tuple[int, str] | None:
        """Number and type of the instance's GPUs; None for an instance type that `MACHINES` does not contain."""
        known = MACHINES.get(self.instance or "")
        return (known.count, known.gpu) if known else None

    def _facts(self) -> dict[str, str]:
        count, kind = self.gpus or (0, "")
        return {
            "app": self.app,
            "region": self.region or "unknown",
            "role": (self.role or "unknown").rpartition("/")[2],
            "instance": self.instance or "unknown",
            "GPUs": f"{count} x {kind}" if count else "none known",
        }

    def __repr__(self) -> str:
        return f"SageMakerPlace({', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return html_table("SageMaker", (), self._facts().items())


def sagemaker_place(
    client: Any = None, environ: Mapping[str, str] | None = None, metadata: Path = Path("/", SAGEMAKER_FILE)
) -> SageMakerPlace:
    """Region, execution role, instance type and GPUs of this SageMaker notebook, from its metadata file.

    client: a boto3.client("sagemaker") that may describe apps or notebook instances, for what the file lacks. Raises
    LookupError outside SageMaker, and ValueError for a file that is no JSON object.
    """
    environ = os.environ if environ is None else environ
    if not metadata.is_file():
        raise LookupError(f"this is not a SageMaker notebook: there is no {metadata}")
    stored = read_json(metadata, "SageMaker writes it anew if you restart the app")
    arn = str(stored.get("ResourceArn", "")).split(":")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or (arn[3] if len(arn) > 3 else None)
    role, instance = stored.get("ExecutionRoleArn"), _instance_in(str(stored.get("ResourceName", "")))
    if client is not None and not (role and instance):
        aws_role, aws_instance = _describe(client, stored)
        role, instance = role or aws_role, instance or aws_instance
    return SageMakerPlace(str(stored.get("AppType", "notebook instance")), region, role, instance)


def _instance_in(name: str) -> str | None:
    """The instance type in the name of a Studio Classic kernel: "datascience-1-0-ml-g5-12xlarge-1abf..."."""
    match = re.search(r"\bml-([a-z]\w*)-(\w+)-[0-9a-f]{20,}$", name)
    return f"ml.{match[1]}.{match[2]}" if match else None


def _describe(client: Any, stored: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Role and instance type of an app or a notebook instance, from AWS."""
    name = stored.get("ResourceName")
    if "AppType" not in stored:
        instance = client.describe_notebook_instance(NotebookInstanceName=name)
        return instance.get("RoleArn"), instance.get("InstanceType")
    owner = {key: stored[key] for key in ("SpaceName", "UserProfileName") if stored.get(key)}
    owner = {"SpaceName": owner["SpaceName"]} if "SpaceName" in owner else owner  # AWS accepts only one of the two
    app = client.describe_app(DomainId=stored["DomainId"], AppType=stored["AppType"], AppName=name, **owner)
    return None, app.get("ResourceSpec", {}).get("InstanceType")
