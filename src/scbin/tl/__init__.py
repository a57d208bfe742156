"""Train models, and use them: functions that take an AnnData and write into it."""

from __future__ import annotations

from scbin.tl._embed import embed
from scbin.tl._evaluate import evaluate
from scbin.tl._finetune import finetune
from scbin.tl._generate import generate
from scbin.tl._impute import impute
from scbin.tl._perturb import perturb
from scbin.tl._perturb_statistics import perturb_statistics
from scbin.tl._predict import predict
from scbin.tl._pretrain import pretrain
from scbin.tl._search import search
from scbin.tl._split import split

__all__ = [
    "embed",
    "evaluate",
    "finetune",
    "generate",
    "impute",
    "perturb",
    "perturb_statistics",
    "predict",
    "pretrain",
    "search",
    "split",
]
