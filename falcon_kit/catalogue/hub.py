"""The Hugging Face hub: what its errors mean for a reader, and a model's config alone.

Neither torch nor transformers is imported, and huggingface_hub only when the hub is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fetch_config(repository: str, **hub: Any) -> Path:
    """The config.json of a repository, a kilobyte, downloaded where it is not in the cache; errors as `hub_errors`."""
    from huggingface_hub import hf_hub_download

    with hub_errors(repository):
        return Path(hf_hub_download(repository, "config.json", **hub))


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Says in the kit's words what huggingface_hub says in many.

    ConnectionError, PermissionError, LookupError, or FileNotFoundError for a file that the repository lacks.
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
        raise FileNotFoundError(f"{repository} lacks a file that a Falcon's repository has ({error})") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated: accept its terms on the hub, then log in with `hf auth login` or pass token=..."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise LookupError(
            f"the hub has no {repository} (or not that revision): check the spelling; fk.catalogue() lists the Falcons "
            "known by name"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub does not give {repository} away just now, try again later: {error}") from error
