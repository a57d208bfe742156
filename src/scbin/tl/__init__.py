"""Train models, and use them: functions that take an AnnData and write into it."""

from __future__ import annotations

from scbin.tl._embed import embed
from scbin.tl._evaluate import evaluate
from scbin.tl._pretrain import pretrain

__all__ = ["embed", "evaluate", "pretrain"]
