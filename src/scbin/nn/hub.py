"""Models on the Hugging Face hub: fetched only when someone names one and says which state of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.nn.checkpoint import ALLOWED
from scbin.nn.files import recovered

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def local_directory(path: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the directory that a path names; with a revision, that of a download from the hub.

    Nothing is fetched without a revision, so that a misspelt path never becomes a request to a server.
    """
    directory = Path(path) if revision is not None else recovered(Path(path))
    hub_id = path if isinstance(path, str) and HUB_ID.fullmatch(path) else None
    if revision is not None and (hub_id is None or os.path.lexists(directory)):
        what = "a path on this machine" if os.path.lexists(directory) else "no 'owner/name' of the hub"
        raise ScbinInputError("M63", f"revision={revision!r} was given, but {str(path)[:200]!r} is {what}.")
    if revision is not None and hub_id is not None:
        return download(hub_id, revision)
    if hub_id is not None and not os.path.lexists(directory):
        raise ScbinModelError(
            "M03",
            f"{path} is not a directory. If you mean a model on the Hugging Face hub, say which state of it: "
            f"Model.load({hub_id!r}, revision='...') with the hash of a commit.",
        )
    return directory


def download(hub_id: str, revision: str) -> Path:
    """Fetch the files of a scbin model, and no others, into the cache of `huggingface_hub`; return their folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=sorted(ALLOWED)))
    except (OSError, ValueError) as error:
        raise ScbinModelError(
            "M64",
            f"{hub_id} at {revision!r} could not be fetched from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error)[:120]}). Check name, revision and connection.",
        ) from error
