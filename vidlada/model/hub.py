"""Models by name: a local folder, or a repository of the Hugging Face hub, which is downloaded into its cache.

Everything about the hub is huggingface_hub's: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, the cache's layout,
progress bars, going on after a broken connection, and keeping what an interrupted download completed.
"""

import re
from pathlib import Path
from typing import Any

from vidlada.errors import InputError, VidLaDAError

SHIPPED = "tiny"
HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
SAFE_WEIGHTS, PICKLED_WEIGHTS = ["*.safetensors"], ["*.bin"]
IN_FOLDERS = ["*/*"]  # training state, exports to other programs


def is_hub_name(name: str) -> bool:
    """Whether a name is no local folder, and has the form `owner/name` or `owner/name@revision`."""
    return not Path(name).is_dir() and HUB_NAME.fullmatch(name) is not None


def with_revision(name: str, revision: str | None) -> str:
    """A model's name with a revision of the hub, where one was asked for; `InputError` where it cannot have one."""
    if revision is None:
        return name
    if not is_hub_name(name):
        raise InputError(f"{name} is no model of the hub; a revision ({revision}) goes with a name such as owner/name")
    if "@" in name:
        raise InputError(f"{name} names a revision already, and {revision} was asked for too; give one of them")
    return f"{name}@{revision}"


def model_folder(name_or_folder: str | Path, revision: str | None = None, what: str = "model") -> Path:
    """Return the local folder of a model or adapter, downloading it if needed; `InputError` if there is none.

    Args:
        name_or_folder: `tiny`, the model in the package; a folder; or a name of the Hugging Face hub, `owner/name` or
            `owner/name@revision`, which is downloaded into the hub's cache.
        revision: of a name of the hub: a branch, tag or commit.
        what: is looked for, for messages.
    """
    if str(name_or_folder) == SHIPPED and revision is None:
        return Path(__file__).parents[1] / "weights" / SHIPPED
    return local_folder(with_revision(str(name_or_folder), revision), what)


def local_folder(name: str | Path, what: str = "model") -> Path:
    """The folder of a model, an adapter or a vision tower; from the hub, it is downloaded first.

    Args:
        name: of a local folder, or `owner/name` or `owner/name@revision` on the hub; a local folder goes first.
        what: is looked for, for messages.

    Raises:
        InputError: there is no such folder, and no such repository or revision on the hub.
        VidLaDAError: the hub cannot be reached, or does not let us in.
    """
    folder = Path(name)
    if str(name) and folder.is_dir():  # an empty name would be the working directory
        return folder
    found = HUB_NAME.fullmatch(str(name))
    if found is None:
        raise InputError(
            f"{name}: no such {what} folder, and no name of the hub either (owner/name, owner/name@revision)"
        )
    return download(found["repository"], found["revision"], what)


def download(repository: str, revision: str | None, what: str) -> Path:
    """The snapshot of a repository in the hub's cache, its weights included: safetensors, or pickles if there are none.

    Raises:
        InputError, VidLaDAError: as `local_folder`.
    """
    folder = _snapshot(repository, revision, what, [*SMALL_FILES, *SAFE_WEIGHTS])
    if any(folder.glob(SAFE_WEIGHTS[0])):
        return folder
    return _snapshot(repository, revision, what, [*SMALL_FILES, *PICKLED_WEIGHTS])


def _snapshot(repository: str, revision: str | None, what: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, constants, errors

    named = repository if revision is None else f"{repository}@{revision}"
    hub = HfApi()
    try:
        chosen: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": IN_FOLDERS}
        return Path(hub.snapshot_download(repository, revision=revision, **chosen))
    except errors.GatedRepoError as error:
        raise VidLaDAError(
            f"{repository} is given to those who accept its terms: do so at {hub.endpoint}/{repository}, then log in "
            f"(hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{named}: no such {what} folder, and {hub.endpoint} has no such repository or keeps it private; for a "
            f"private one log in (hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision!r} at {hub.endpoint}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{named}: no such {what} folder, and no name of the hub either") from error
    except errors.LocalEntryNotFoundError as error:  # not in the cache, or not all of it, and the hub out of reach
        cache = constants.HF_HUB_CACHE
        if constants.HF_HUB_OFFLINE:
            raise VidLaDAError(
                f"{named}: no such {what} folder; it is not complete in the cache {cache}, and HF_HUB_OFFLINE forbids "
                f"to download it"
            ) from error
        raise VidLaDAError(_unreachable(named, what, hub.endpoint, error.__cause__ or error)) from error
    except Exception as error:  # of several HTTP libraries, which the hub's client lets through
        raise VidLaDAError(_unreachable(named, what, hub.endpoint, error)) from error


def _unreachable(named: str, what: str, endpoint: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{named}: no such {what} folder, and it could not be downloaded from {endpoint}: {reason}; what is complete "
        f"is kept, so run the same again once the network is there"
    )
