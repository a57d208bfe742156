"""Train models, and use them: functions that take an AnnData and write into it."""

from __future__ import annotations

from scbin.tl._embed import embed
from scbin.tl._evaluate import evaluate
from scbin.tl._finetune import finetune
from scbin.tl._perturb import perturb
from scbin.tl._predict import predict
from scbin.tl._pretrain import pretrain
from scbin.tl._splits import split

__all__ = ["embed", "evaluate", "finetune", "perturb", "predict", "pretrain", "split"]
