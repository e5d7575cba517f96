"""What the notebook services offer on request: secrets, Colab's widget manager, SageMaker's role and instance.

Nothing happens at import; each effect has a call of its own. Which service this is, `environment` knows.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from falcon_kit.display.tables import html_table
from falcon_kit.planning.devices import MACHINES
from falcon_kit.planning.places import detect_place

_METADATA = Path("/opt/ml/metadata/resource-metadata.json")
"""https://docs.aws.amazon.com/sagemaker/latest/dg/notebooks-run-and-manage-metadata.html"""


def secret(name: str, environ: Mapping[str, str] | None = None) -> str:
    """A secret by name: from the environment, else from the secrets of Colab or Kaggle. It is never shown.

    Raises LookupError, with where to put it, for one that is not there or that this notebook may not see.
    """
    environ = os.environ if environ is None else environ
    if value := environ.get(name):
        return value
    place, _ = detect_place(environ, sys.modules)
    value, where = "", f"set the environment variable {name} before Jupyter starts"
    if place == "Colab":
        value, where = _from_colab(name), f"add {name} under Secrets (the key in the left bar) and grant access to it"
    elif place == "Kaggle":
        value, where = _from_kaggle(name), f"add {name} under Add-ons, Secrets, and attach it to this notebook"
    if not value:
        raise LookupError(f"there is no secret {name} in {place}: {where}")
    return value


def _from_colab(name: str) -> str:
    """Colab's userdata; empty for a secret that is not there or not granted."""
    userdata = import_module("google.colab.userdata")
    try:
        return userdata.get(name) or ""
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
        return ""


def _from_kaggle(name: str) -> str:
    """Kaggle's client; empty for a secret that is not attached."""
    try:
        return import_module("kaggle_secrets").UserSecretsClient().get_secret(name) or ""
    except Exception:  # noqa: BLE001  # its exceptions have moved between modules; all of them mean: no secret
        return ""


def enable_widgets(environ: Mapping[str, str] | None = None) -> bool:
    """Lets Colab show widgets of packages; says whether there was anything to switch on. No other service needs it.

    Colab serves their JavaScript from a public network for that, so it happens only when called.
    """
    place, _ = detect_place(os.environ if environ is None else environ, sys.modules)
    if place != "Colab":
        return False
    import_module("google.colab.output").enable_custom_widget_manager()
    return True


@dataclass(frozen=True, repr=False)
class SageMakerPlace:
    """Where in SageMaker a notebook runs; a table in Jupyter. Account numbers are held, not shown."""

    app: str
    """"JupyterLab", "CodeEditor", "KernelGateway", ..., or "notebook instance"."""
    region: str | None
    """Such as "eu-west-1"."""
    role: str | None
    """ARN of the execution role, for whoever deploys; None where neither the metadata nor AWS tells."""
    instance: str | None
    """Such as "ml.g5.12xlarge"; None where neither the metadata nor AWS tells."""

    @property
    def gpus(self) -> tuple[int, str] | None:
        """How many GPUs of which kind the instance type has; None for one without, or one that `machines` lacks."""
        return MACHINES.get(self.instance or "")

    def _facts(self) -> dict[str, str]:
        count, kind = self.gpus or (0, "")
        return {
            "app": self.app,
            "region": self.region or "not known",
            "role": (self.role or "not known").rpartition("/")[2],
            "instance": self.instance or "not known",
            "GPUs": f"{count} x {kind}" if count else "none known of",
        }

    def __repr__(self) -> str:
        return f"SageMakerPlace({', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return html_table("SageMaker", (), self._facts().items())


def sagemaker_place(
    client: Any = None, environ: Mapping[str, str] | None = None, metadata: Path = _METADATA
) -> SageMakerPlace:
    """Region, execution role, instance type and GPUs of this SageMaker notebook.

    Read from its metadata file. What that does not tell is asked of AWS if `client` is given, a
    boto3.client("sagemaker") whose role may describe apps or notebook instances. Raises LookupError outside SageMaker.
    """
    environ = os.environ if environ is None else environ
    try:
        told: dict[str, Any] = json.loads(metadata.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LookupError(f"this is not SageMaker: there is no {metadata}, which its notebooks have") from None
    arn = str(told.get("ResourceArn", "")).split(":")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or (arn[3] if len(arn) > 3 else None)
    role, instance = told.get("ExecutionRoleArn"), _instance_in(str(told.get("ResourceName", "")))
    if client is not None and not (role and instance):
        asked_role, asked_instance = _ask(client, told)
        role, instance = role or asked_role, instance or asked_instance
    return SageMakerPlace(str(told.get("AppType", "notebook instance")), region, role, instance)


def _instance_in(name: str) -> str | None:
    """The instance type in the name of a kernel of Studio Classic: "datascience-1-0-ml-g5-12xlarge-1abf..."."""
    found = re.search(r"\bml-([a-z]\w*)-(\w+)-[0-9a-f]{20,}$", name)
    return f"ml.{found[1]}.{found[2]}" if found else None


def _ask(client: Any, told: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Role and instance type as AWS knows them, of an app or of a notebook instance."""
    name = told.get("ResourceName")
    if "AppType" not in told:
        found = client.describe_notebook_instance(NotebookInstanceName=name)
        return found.get("RoleArn"), found.get("InstanceType")
    owner = {key: told[key] for key in ("SpaceName", "UserProfileName") if told.get(key)}
    owner = {"SpaceName": owner["SpaceName"]} if "SpaceName" in owner else owner  # AWS takes one of the two
    app = client.describe_app(DomainId=told["DomainId"], AppType=told["AppType"], AppName=name, **owner)
    return None, app.get("ResourceSpec", {}).get("InstanceType")
