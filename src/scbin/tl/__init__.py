"""Train models, and use them: functions that take an AnnData and write into it."""

from __future__ import annotations

from scbin.tl._age_gap import age_gap
from scbin.tl._embed import embed
from scbin.tl._evaluate import evaluate
from scbin.tl._evaluate_perturbations import evaluate_perturbations
from scbin.tl._finetune import finetune
from scbin.tl._fit_perturbations import fit_perturbations
from scbin.tl._gene_network import attention, gene_association, gene_network
from scbin.tl._gene_vectors import embed_genes, embed_phenotypes, vector_distances
from scbin.tl._generate import generate, impute
from scbin.tl._perturb import perturb
from scbin.tl._perturb_statistics import perturb_statistics
from scbin.tl._predict import predict, roll_up
from scbin.tl._predict_perturbations import predict_perturbations
from scbin.tl._pretrain import pretrain
from scbin.tl._search import search
from scbin.tl._split import split

__all__ = [
    "age_gap",
    "attention",
    "embed",
    "embed_genes",
    "embed_phenotypes",
    "evaluate",
    "evaluate_perturbations",
    "finetune",
    "fit_perturbations",
    "gene_association",
    "gene_network",
    "generate",
    "impute",
    "perturb",
    "perturb_statistics",
    "predict",
    "predict_perturbations",
    "pretrain",
    "roll_up",
    "search",
    "split",
    "vector_distances",
]
