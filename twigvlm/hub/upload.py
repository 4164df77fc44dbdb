"""A folder to the hub: one commit that is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import hub_id
from ..errors import InputError, RunError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

MAIN = "main"
EMBEDDED = "sprout"  # which comes along with the package
MESSAGE = "A twig, its description and its card"


def check_name(name: str) -> None:
    """Raises InputError for what cannot be the name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as fault:
        raise InputError(f"repository is {name!r}; owner/name is needed ({' '.join(str(fault).split())})") from fault
    if "/" not in name:
        raise InputError(f"repository is {name!r}; owner/name is needed, such as YOU/{name}")


def check_base(base: object, remedy: str) -> None:
    """Raises InputError for a base that nobody else can have: a folder of this machine, whose path would be told to all."""
    if not isinstance(base, str) or (hub_id(base) is None and base != EMBEDDED):
        raise InputError(f"the base is {base!r}, no id on the hub, by which others could find it; {remedy}")


def upload(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """The files of `folder` as one commit of the model repository `name`, which is made where there is none.

    `revision` is a branch, made where there is none; `private` holds for a new repository (None: as its owner usually
    does). Raises InputError for a name or branch that cannot be and for a hub that refuses, RunError for one that cannot
    be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    check_name(name)
    broken = HfHubHTTPError.__bases__  # of the HTTP library beneath, whichever it is
    if create_pr and revision not in (None, MAIN):
        raise InputError(
            f"revision is {revision!r}, but a pull request goes to {MAIN}; give one of revision and create_pr"
        )
    files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir()) if file.is_file()]
    api = HfApi(token=token)
    try:
        if not create_pr:  # which goes to a repository of somebody else
            api.create_repo(name, private=private, repo_type="model", exist_ok=True)
            if revision not in (None, MAIN):
                api.create_branch(name, branch=revision, exist_ok=True)
        return api.create_commit(
            name, files, commit_message=commit_message or MESSAGE, revision=revision, create_pr=create_pr
        )
    except HFValidationError as fault:
        raise InputError(f"{name}: {_line(fault)}") from fault
    except LocalTokenNotFoundError as fault:
        raise InputError(f"{name}: nobody is logged in here; `hf auth login`, or give a token") from fault
    except OfflineModeIsEnabled as fault:
        raise RunError(f"{name}: nothing was uploaded, HF_HUB_OFFLINE is set; unset it") from fault
    except HfHubHTTPError as fault:
        status = fault.response.status_code if fault.response is not None else 0
        if status in (401, 403):
            raise InputError(
                f"{name}: the hub does not let you write there ({status}); log in with `hf auth login`, or give the token of an account "
                "that may, or another owner"
            ) from fault
        kind = InputError if 400 <= status < 500 else RunError
        raise kind(f"{name}: the hub refuses ({_line(fault)})") from fault
    except (*broken, OSError) as fault:
        raise RunError(
            f"{name}: the hub cannot be reached ({_line(fault)}); check the network and try again"
        ) from fault


def _line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300] or type(fault).__name__
