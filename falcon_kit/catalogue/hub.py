"""The Hugging Face hub: the config.json of a repository, and plain error texts for its errors.

Neither torch nor transformers is imported, and huggingface_hub only when a function is called.
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE = 10  # seconds for a connection, as huggingface_hub's own for a request


def is_cut_off() -> bool:
    """Whether a connection to the hub fails. False behind a proxy, where that says nothing, and with HF_HUB_OFFLINE.

    huggingface_hub would try again for 24 seconds, and has no setting for that.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode() or getproxies():
        return False
    url = urlsplit(constants.ENDPOINT)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), _PATIENCE).close()
    except OSError:
        return True
    return False


def cache_alone_if_cut_off(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of huggingface_hub with which it asks the cache alone where the hub cannot be reached."""
    return {**hub, "local_files_only": hub.get("local_files_only", False) or is_cut_off()}


def _adapter_config(repository: str, **hub: Any) -> Path | None:
    """The path of a repository's adapter_config.json; None where it holds no adapter or cannot be reached."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache

    name, where = "adapter_config.json", {key: hub.get(key) for key in ("cache_dir", "revision")}
    try:
        with hub_errors(repository):
            if try_to_load_from_cache(repository, name, **where) is _CACHED_NO_EXIST:
                return None
            return Path(hf_hub_download(repository, name, **hub))
    except (ConnectionError, FileNotFoundError):
        return None


def fetch_configs(repository: str, **hub: Any) -> Path:
    """The folder of a repository's config.json, adapter_config.json or both. Raises the errors of `hub_errors`."""
    from huggingface_hub import hf_hub_download

    try:
        with hub_errors(repository):
            config = Path(hf_hub_download(repository, "config.json", **hub))
    except (ConnectionError, FileNotFoundError) as error:  # an adapter's repository has no config.json
        cached_only = isinstance(error, ConnectionError) or hub.get("local_files_only", False)
        if (adapter := _adapter_config(repository, **{**hub, "local_files_only": cached_only})) is None:
            raise
        return adapter.parent
    _adapter_config(repository, **{**hub, "revision": config.parent.name})  # of the same commit
    return config.parent


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Replaces the errors of huggingface_hub by built-in ones whose text contains the remedy.

    ConnectionError, PermissionError for a gated repository, LookupError for an unknown repository or revision, and
    FileNotFoundError for a file that the repository lacks.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{repository} is not in the local cache and the hub cannot be reached: connect this machine, copy the "
            "checkpoint into a directory and load that, or use 'falconet', which needs no download"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} lacks a file that a Falcon repository needs ({error})") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated: accept its terms on the hub, then log in with `hf auth login` or pass token=..."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise LookupError(
            f"the hub has no {repository}, or not this revision: check the spelling (fk.catalogue() lists the Falcons "
            "known by name); a private one needs `hf auth login` or token=..."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub failed to return {repository}, try again later: {error}") from error
