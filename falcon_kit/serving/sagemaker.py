"""SageMaker endpoints: boto3's invoke_endpoint_with_response_stream, with a container's own protocol inside.

A streamed response may take longer than the 60 seconds of InvokeEndpoint. boto3 is in the extra "serving".
"""

import asyncio
import concurrent.futures
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from falcon_kit.serving import openai_api, tgi
from falcon_kit.serving.connection import MOST_BYTES, Connection
from falcon_kit.serving.failures import Unavailable, error_message, http_error, reading, within
from falcon_kit.serving.protocol import Delta, Facts, Request, lines_of

_VLLM = replace(openai_api.VLLM, counts=False)  # SageMaker forwards no other path
BUSY = ("ThrottlingException", "ServiceUnavailable", "ServiceUnavailableException", "ModelNotReadyException")
REFUSED = (
    "AccessDeniedException",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "UnrecognizedClientException",
)


async def discover(name: str, api: str, model: str | None, connection: Connection, session: Any) -> "SageMakerServer":
    """The endpoint of that name, in service. boto3 blocks, so it runs in a thread."""
    server = await _in_thread(SageMakerServer, name, api, model, connection, session)
    async with within(connection.timeout, server.facts.address, connection.timeout_name):
        await _in_thread(server.check)
    return server


class SageMakerServer:
    """A SageMaker endpoint. api: "tgi" for the schema of TGI and LMI containers, "openai" for vLLM's."""

    def __init__(self, name: str, api: str, model: str | None, connection: Connection, session: Any) -> None:
        self._name, self.connection = name, connection
        self._control, self._runtime = _clients(session, connection)
        address = f"sagemaker://{name}"
        self.facts, self.api = Facts(f"SageMaker ({api})", address, model or name), api

    def body(self, request: Request) -> dict[str, Any]:
        if self.api == "tgi":
            return {**tgi.request_body(request, self.facts.server), "stream": True}
        body = openai_api.request_body(request, self.facts.model, _VLLM)
        return {name: value for name, value in body.items() if name != "model"}

    async def count(self, request: Request) -> int:
        """Not possible: SageMaker has no path for it, so `body` refuses `max_length`."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises LookupError for an endpoint that does not exist, `Unavailable` for one that is not in service yet.

        Without the permission to describe the endpoint, nothing is checked.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            description = self._control.describe_endpoint(EndpointName=self._name)
        except (BotoCoreError, ClientError) as error:
            if _code(error) != "AccessDeniedException":
                raise self._explain(error) from None
            return
        status = description["EndpointStatus"]
        if status == "Failed":
            raise ConnectionError(
                f"{self.facts.address} has failed: {description.get('FailureReason', 'AWS gives no reason')}"
            )
        if status not in ("InService", "Updating", "SystemUpdating"):
            raise Unavailable(f"{self.facts.address} is {status}: wait until it is InService")

    async def deltas(self, body: dict[str, Any]) -> AsyncIterator[Delta]:
        """Sends the request and yields the deltas of each line; boto3 blocks, so it runs in a thread."""
        stream = await _in_thread(self._invoke, body)
        begun, left = False, MOST_BYTES  # until the next event

        async def parts() -> AsyncIterator[bytes]:
            nonlocal left
            events = iter(stream)
            while (event := await _in_thread(self._next, events)) is not None:
                received = event.get("PayloadPart", {}).get("Bytes", b"")
                left -= len(received)
                if left < 0:
                    raise ConnectionError(f"{self.facts.address} sends more than {MOST_BYTES:,} bytes without an end")
                yield received

        try:
            async for line in lines_of(parts()):
                for delta in self._read(line, body, begun):
                    left, begun = MOST_BYTES, True
                    yield delta
        finally:  # not awaited: with urllib3 before 2.3, closing waits while a thread reads
            _in_thread(_close, stream)

    def _invoke(self, body: dict[str, Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            response = self._runtime.invoke_endpoint_with_response_stream(
                EndpointName=self._name, ContentType="application/json", Body=json.dumps(body).encode()
            )
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from None
        return response["Body"]

    def _next(self, events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        try:
            return next(events, None)
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error) from None
        except ReadTimeoutError:
            raise self._silent() from None
        except (HTTPError, OSError) as error:
            raise Unavailable(f"the connection to {self.facts.address} broke ({type(error).__name__})") from None

    def _read(self, line: bytes, body: dict[str, Any], begun: bool) -> Iterator[Delta]:
        """The deltas of a line of the response to `body`: an event of TGI, or a chunk of the OpenAI protocol."""
        address = self.facts.address
        with reading(address):
            data = data_of(line.decode())
        if data and self.api == "tgi":
            yield tgi.read_event(data, address, tgi.reshapes(body["parameters"]))
        elif data:
            yield from openai_api.read_event(data, address, begun)

    def _silent(self) -> TimeoutError:
        return TimeoutError(
            f"{self.facts.address} sent nothing for {self.connection.timeout:g} s: give a longer timeout="
        )

    def _explain(self, error: Exception) -> Exception:
        from botocore import exceptions as aws

        address, message = self.facts.address, str(error)
        response = getattr(error, "response", None) or {}
        code = _code(error)
        if code == "ModelError":  # from the container, not from AWS
            status, original = response.get("OriginalStatusCode", 500), response.get("OriginalMessage", message)
            return http_error(status, error_message(original), address, {})
        if code in BUSY or isinstance(error, aws.EndpointConnectionError | aws.ConnectionClosedError):
            return Unavailable(f"{address} is busy or not reachable: try again later. AWS reports: {message}")
        if code in REFUSED or isinstance(error, aws.NoCredentialsError):
            return PermissionError(
                f"AWS refuses these credentials for {address}: check role and region. AWS reports: {message}"
            )
        if "not find" in message or "not found" in message:
            return LookupError(f"{address} is not in this region: check name and region. AWS reports: {message}")
        if isinstance(error, aws.ReadTimeoutError):
            return self._silent()
        return ConnectionError(f"{address} failed. AWS reports: {message}")


def data_of(line: str) -> str:
    """The data in a line of server-sent events or of JSON, as LMI's containers write it; empty where it has none."""
    data = line.removeprefix("data:").strip()
    return "" if data == "[DONE]" or data.startswith((":", "event:")) else data


def _in_thread(function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    """As `asyncio.to_thread`, in a daemon thread, for which Python does not wait: a server may never answer."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001  # raised where it is awaited
                future.set_exception(error)

    threading.Thread(target=run, name="falcon-kit-sagemaker", daemon=True).start()
    return asyncio.wrap_future(future)


def _code(error: Exception) -> str:
    """AWS's name of an error; empty for an error of the connection."""
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def _close(stream: Any) -> None:
    """Closes a response. Its socket ends first, so that a thread that reads ends too."""
    with suppress(AttributeError, ValueError, RuntimeError, OSError):
        stream._raw_stream.shutdown()  # an urllib3.HTTPResponse
    stream.close()


def _clients(session: Any, connection: Connection) -> tuple[Any, Any]:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import NoRegionError
    except ModuleNotFoundError:
        raise ModuleNotFoundError("SageMaker endpoints need boto3: pip install boto3") from None
    # boto3 ignores AWS_REGION, which Lambda, ECS and SageMaker set
    session = session or boto3.Session(region_name=os.environ.get("AWS_REGION"))
    timeout = connection.timeout
    # `retry_stream` repeats requests
    config = Config(retries={"total_max_attempts": 1}, read_timeout=timeout, connect_timeout=min(timeout, 10))
    try:
        return session.client("sagemaker", config=config), session.client("sagemaker-runtime", config=config)
    except NoRegionError:
        raise ValueError(
            "no AWS region is set: set AWS_REGION, or pass session=boto3.Session(region_name='eu-west-1')"
        ) from None
