"""Which model a verb means: one given, one on disk, or the one that was trained on these cells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from scbin import _keys
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.model import Model

if TYPE_CHECKING:
    from anndata import AnnData

# the models that pretrain returned last in this session, by the id it left in uns; a notebook rarely has more in use
_session: dict[str, Model] = {}
_MOST_KEPT = 4


def remember(identifier: str, model: Model) -> None:
    """Keep a model for the verbs that follow in this session."""
    _session[identifier] = model
    while len(_session) > _MOST_KEPT:
        del _session[next(iter(_session))]


def resolve_model(model: Model | str | os.PathLike[str] | None, adata: AnnData) -> Model:
    """Return the model itself, the one in a directory, or for `None` the one that was trained on these cells."""
    if isinstance(model, Model):
        return model
    if isinstance(model, str | os.PathLike):
        return Model.load(model)
    if model is not None:
        raise ScbinTypeError(
            "M20", f"model is a {type(model).__name__}; pass a scbin.Model or the path of its directory."
        )
    entry = adata.uns.get(_keys.UNS, {})
    identifier, directory = (str(entry.get(key, "")) for key in (_keys.MODEL_ID, _keys.MODEL_PATH))
    if identifier in _session:
        return _session[identifier]
    if directory and Path(directory).is_dir():
        found = Model.load(directory)
        if found.fingerprint == identifier:
            return found
        raise ScbinInputError(
            "M22",
            f"{directory} now holds another model than the one trained on these cells. Pass the one you mean: "
            "model='my_model'.",
        )
    raise ScbinInputError(
        "M21",
        "no model was given, and none is known for these cells in this session. Pass the one that scbin.tl.pretrain "
        "returned, or the directory that model.save(...) wrote: model='my_model'.",
    )
