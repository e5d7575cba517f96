"""The same interface over a running endpoint: `connect`."""

from falcon_kit.remote.endpoint import Endpoint, connect
from falcon_kit.remote.stream import IncompleteAnswer, RemoteStream

__all__ = ["Endpoint", "IncompleteAnswer", "RemoteStream", "connect"]
