"""SageMaker endpoints: boto3's invoke_endpoint_with_response_stream, with a container's own protocol inside.

A streamed response is not bound to the 60 seconds that InvokeEndpoint allows. boto3 comes with the extra "sagemaker".
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

from falcon_kit.serving import openai_api, tgi
from falcon_kit.serving.protocol import Connection, Delta, Facts, Request, Unavailable, as_json, failure, message_in

BUSY = ("ThrottlingException", "ServiceUnavailable", "ServiceUnavailableException", "ModelNotReadyException")
REFUSED = (
    "AccessDeniedException",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "UnrecognizedClientException",
)


class SageMakerServer:
    """Speaks with one endpoint: "tgi" is the schema of TGI and LMI containers, "openai" that of vLLM's."""

    def __init__(self, name: str, api: str, model: str | None, wire: Connection, session: Any) -> None:
        self._name, self._wire = name, wire
        self._control, self._runtime = _clients(session, wire)
        address = f"sagemaker://{name}"
        self.facts = Facts(f"SageMaker ({api})", address, model or name)
        self._openai = openai_api.OpenAIServer("http://unused", self.facts, openai_api.VLLM, wire)
        self._api, self.stops, self.chats = api, True, api == "openai"

    def body(self, request: Request) -> dict[str, Any]:
        """The container's own request."""
        if self._api == "tgi":
            return {**tgi.body(request, self.facts.server), "stream": True}
        body = self._openai.body(request)
        return {name: value for name, value in body.items() if name != "model"}

    def check(self) -> None:
        """Raises LookupError for an endpoint that is not there, Unavailable for one that is not in service yet.

        A role that may invoke an endpoint but not describe it gets no such check.
        """
        from botocore.exceptions import ClientError

        try:
            found = self._control.describe_endpoint(EndpointName=self._name)
        except ClientError as error:
            if error.response["Error"]["Code"] != "AccessDeniedException":
                raise self._explain(error) from None
            return
        status = found["EndpointStatus"]
        if status == "Failed":
            raise ConnectionError(
                f"{self.facts.address} has failed: {found.get('FailureReason', 'no reason is given')}"
            )
        if status not in ("InService", "Updating", "SystemUpdating"):
            raise Unavailable(f"{self.facts.address} is {status}: wait until it is InService")

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields what each line of the answer says; boto3 waits in a thread."""
        stream = await asyncio.to_thread(self._invoke, body)
        events = iter(stream)
        unfinished = b""  # a part may end anywhere, within a character too
        try:
            while (event := await asyncio.to_thread(self._next, events)) is not None:
                *lines, unfinished = (unfinished + event.get("PayloadPart", {}).get("Bytes", b"")).split(b"\n")
                for line in lines:
                    for delta in self._read(line.decode()):
                        yield delta
            for delta in self._read(unfinished.decode(errors="replace")):
                yield delta
        finally:
            stream.close()

    def _invoke(self, body: dict[str, Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._runtime.invoke_endpoint_with_response_stream(
                EndpointName=self._name, ContentType="application/json", Body=json.dumps(body).encode()
            )
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from None
        return answer["Body"]

    def _next(self, events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            return next(events, None)
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from None
        except (HTTPError, OSError) as error:
            raise ConnectionError(f"{self.facts.address} broke the connection off ({type(error).__name__})") from None

    def _read(self, line: str) -> Iterator[Delta]:
        """The deltas of a line: TGI's event, or OpenAI's chunk."""
        if self._api == "tgi":
            delta = tgi.read(line, self.facts.address)
            return iter([delta] if delta else [])
        chunk = as_json(line.removeprefix("data:"))
        return openai_api.read(chunk) if isinstance(chunk, dict) else iter(())

    def _explain(self, error: Exception) -> Exception:
        """The exception for one of boto's."""
        from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError

        address, said = self.facts.address, self._wire.scrub(str(error))
        response = getattr(error, "response", None) or {}
        code = response.get("Error", {}).get("Code", "")
        if code == "ModelError":  # the container's own answer
            status, text = response.get("OriginalStatusCode", 500), response.get("OriginalMessage", said)
            return failure(status, message_in(as_json(text) or text), address, {})
        if code in BUSY or isinstance(error, EndpointConnectionError):
            return Unavailable(f"{address} is busy or out of reach: try again later. AWS says: {said}")
        if code in REFUSED or isinstance(error, NoCredentialsError):
            return PermissionError(
                f"AWS refuses these credentials for {address}: check role and region. AWS says: {said}"
            )
        if "not find" in said or "not found" in said:
            return LookupError(f"there is no {address} in this region: check name and region. AWS says: {said}")
        if isinstance(error, ReadTimeoutError):
            return TimeoutError(f"{address} has not said a word for {self._wire.timeout:g} s: give a longer timeout=")
        return ConnectionError(f"{address} failed. AWS says: {said}")


def _clients(session: Any, wire: Connection) -> tuple[Any, Any]:
    """boto3's clients for the control plane and for invoking."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import NoRegionError
    except ModuleNotFoundError:
        raise ModuleNotFoundError('SageMaker endpoints need boto3: pip install "falcon-kit[sagemaker]"') from None
    # boto3 itself does not know AWS_REGION, which Lambda, ECS and SageMaker set
    session = session or boto3.Session(region_name=os.environ.get("AWS_REGION"))
    # `retry_stream` knows when to try again
    config = Config(retries={"total_max_attempts": 1}, read_timeout=wire.timeout, connect_timeout=min(wire.timeout, 10))
    try:
        return session.client("sagemaker", config=config), session.client("sagemaker-runtime", config=config)
    except NoRegionError:
        raise ValueError(
            "no AWS region is set: set AWS_REGION, or pass session=boto3.Session(region_name='eu-west-1')"
        ) from None
