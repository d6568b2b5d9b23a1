"""Put a published folder on the hub: one commit and one tag, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
_KEPT = (".gitattributes",)  # the hub's own file


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """Where on the hub.

    Attributes:
        repo: ``organisation/name``.
        tag: of the commit; None takes one from the adapter's digest.
        private: whether a new repository can be seen by its owners alone.

    Raises:
        ConfigError: the name is not of that form.
    """

    repo: str
    tag: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            raise ConfigError(f"{self.repo!r} is no name on the hub; expected hub:ORGANISATION/NAME") from None
        if "/" not in self.repo:
            raise ConfigError(f"{self.repo!r} names no owner; expected hub:ORGANISATION/NAME")


def check_access(place: HubPlace) -> None:
    """Find out before the work begins whether the hub can be reached with this token.

    Raises:
        ConfigError: there is no token.
        CheckpointError: the hub does not answer, or refuses the token.
    """
    api = _api()
    with _clear_errors(f"cannot publish to {place.repo}"):
        api.whoami()


def upload(folder: Path, place: HubPlace, *, default_tag: str) -> str:
    """Make the repository hold exactly what the folder holds, in one commit with a tag; the commit's address.

    All files are sent before the commit is made, so a fault on the way changes nothing that anybody can see; an empty
    new repository may be left.

    Raises:
        CheckpointError: the hub is out of reach, refuses, or has the tag already.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, tag = _api(), place.tag or default_tag
    with _clear_errors(f"{place.repo} was left as it was"):
        api.create_repo(place.repo, private=place.private, exist_ok=True)
        if any(known.name == tag for known in api.list_repo_refs(place.repo).tags):
            raise CheckpointError(
                f"{place.repo} has a tag {tag} already: this was published before; choose another --tag"
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        old = [name for name in api.list_repo_files(place.repo) if name not in (*names, *_KEPT)]
        commit = api.create_commit(
            place.repo,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)),
                *(CommitOperationDelete(name) for name in old),
            ],
            commit_message=f"Publish {tag} with TerseLM",
        )
    with _clear_errors(f"{place.repo} holds the files in commit {commit.oid}, but without the tag {tag}"):
        api.create_tag(place.repo, tag=tag, revision=commit.oid)
    return str(commit.commit_url)


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        raise ConfigError("publishing to the hub needs a token that may write; set HF_TOKEN")
    return HfApi(endpoint=constants.ENDPOINT, library_name="terselm")


@contextmanager
def _clear_errors(consequence: str) -> Iterator[None]:
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    transport = next(kind for kind in type(get_session()).__mro__ if kind.__module__.startswith("http")).__module__
    library = __import__(transport.split(".")[0])
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}"
        if status in (401, 403):
            reason = f"the hub refused the token ({status}): it must be valid and may write there"
        raise CheckpointError(f"{reason}; {consequence}") from None
    except (library.HTTPError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); {consequence}") from None
