"""The Hugging Face hub: GPT-2's published weights by name, `gpt2-medium` or `gpt2-medium@REVISION`,
and the place for exports.

They come from the Hugging Face hub (`$HF_ENDPOINT` stands in for it) into its cache (`$HF_HOME`);
a broken transfer is taken up again. The hub names each file by its checksum, which is verified.
"""

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from common.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "pretrained_checkpoints"
REPOSITORIES = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
ALIASES = {"gpt2-small": "gpt2"}
CARDS = {"gpt2": "gpt2.sm", "gpt2-medium": "gpt2.md", "gpt2-large": "gpt2.lg", "gpt2-xl": "gpt2.xl"}
FILE = "model.safetensors"


def published_name(path: str | Path) -> str | None:
    """Return the key of REPOSITORIES that a name, or a place where its weights are kept, is of."""
    name, _, _ = str(path).partition("@")
    name = ALIASES.get(name, name.removeprefix("openai-community/"))
    if name in REPOSITORIES:
        return name
    folders = {part.rpartition("--")[2] for part in Path(path).parts if part.startswith("models--")}
    if Path(path).resolve().is_relative_to(FOLDER):
        folders |= {*Path(path).resolve().relative_to(FOLDER).parts[:1]}
    return next((name for name in folders if name in REPOSITORIES), None)


def find(path: str | Path) -> Path:
    """The path itself if something is there or it is no published name. Otherwise the weights of
    that name: those in pretrained_checkpoints/, or the hub's, downloaded unless in the cache.

    Raises:
        InputError: the hub cannot be reached, or the file is not what the hub says it is.
    """
    published = _named(path)
    if published is None:
        return Path(path)
    file = at_hand(path) or _download(*published)
    if file.parent.parent != FOLDER:
        _verify(file)
    return file


def at_hand(path: str | Path) -> Path | None:
    """Return what `find` does, or None where it would have to be downloaded."""
    from huggingface_hub import try_to_load_from_cache

    published = _named(path)
    if published is None:
        return Path(path)
    name, revision = published
    local = FOLDER / name / FILE
    if local.is_file() and "@" not in str(path):
        return local
    cached = try_to_load_from_cache(REPOSITORIES[name], FILE, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _named(path: str | Path) -> tuple[str, str] | None:
    """The published name and the revision that a path stands for; None if something is there."""
    name, _, revision = str(path).partition("@")
    name = ALIASES.get(name, name.removeprefix("openai-community/"))
    if Path(path).exists() or name not in REPOSITORIES:
        return None
    return name, revision or "main"


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    repository = REPOSITORIES[name]
    try:
        if not constants.HF_HUB_OFFLINE:
            _reach(constants.ENDPOINT)
        return Path(hf_hub_download(repository, FILE, revision=revision))
    except Exception as error:  # whatever the network and its libraries raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{name} is not in the cache and cannot be downloaded ({reason}); put "
            f"{constants.ENDPOINT}/{repository}/resolve/{revision}/{FILE} to {FOLDER / name / FILE}"
        ) from error


def check_push(repository: str) -> None:
    """Refuse, before anything is computed, what cannot be pushed to.

    Raises:
        InputError: `repository` is not OWNER/NAME, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {repository!r} is not OWNER/NAME: {error}") from error
    if repository.count("/") != 1:
        raise InputError(f"--push_to_hub {repository} is not OWNER/NAME; name the owner, too")
    if get_token() is None:
        raise InputError("--push_to_hub: nobody is logged in; run `hf auth login` or set HF_TOKEN")


def push(files: Mapping[str, Path], repository: str, private: bool = False) -> str:
    """Upload files, by their name there, into a model repository, which is made where there is
    none; returns its address.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    try:
        _reach(constants.ENDPOINT)
        api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Upload {', '.join(files)}")
    except Exception as error:  # whatever the network and its libraries raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"--push_to_hub {repository}: {reason}; the files are written, push them again later"
        ) from error
    return f"{constants.ENDPOINT}/{repository}"


def _reach(address: str) -> None:
    """Fail at once where nobody answers; the client would try again for half a minute."""
    with contextlib.suppress(HTTPError):  # an answer too
        urlopen(Request(address, method="HEAD"), timeout=10).close()


def _verify(file: Path) -> None:
    """Compare with the checksum that the cache has in the name of the linked file."""
    expected = file.resolve().name
    if not re.fullmatch("[0-9a-f]{64}", expected):
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        file.resolve().unlink()
        raise InputError(f"{file} had another checksum than the hub's; it was removed, try again")
