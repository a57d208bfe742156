"""Every AnnData slot name, once."""

from __future__ import annotations

TOKENS = "X_tokens"  # obsm, CSR: row = cell, column = position id, value = token id
EMBEDDING = "X_scbin"  # obsm, float32 (cells, hidden)
GENES = "scbin_genes"  # varm, float32 (genes, hidden)
N_CELLS = "scbin_n_cells"  # var, cells that express the gene
UMAP = "X_umap_scbin"  # obsm, float32 (cells, 2)
STATUS = "scbin_status"  # obs, categorical: "ok", "empty", "no_vocab_gene"
UNS = "scbin"  # uns, one entry per verb, and:
VOCABULARY = "vocabulary"  # uns["scbin"]["vocabulary"], one JSON string
ROW_VOCABULARY = "scbin_vocabulary"  # obs, categorical: fingerprint of the vocabulary of each row, its first 16 digits
HISTORY = "pretrain_history"  # uns["scbin"]["pretrain_history"], a table; of fine-tuning "finetune_history"
PRETRAIN = "pretrain"  # uns["scbin"]["pretrain"], how the model was trained, one JSON string
EMBED = "embed"  # uns["scbin"]["embed"], how the embedding was made, one JSON string
TOKENIZE = "tokenize"  # uns["scbin"]["tokenize"], what the matrix was taken for, one JSON string
WRITTEN = "written"  # uns["scbin"]["written"], JSON list of slots scbin wrote under names that the user chose
MODEL_ID = "model_id"  # uns["scbin"]["model_id"], fingerprint of the model trained on these cells
MODEL_PATH = "model_path"  # uns["scbin"]["model_path"], where it was saved
GENERATED = "scbin_generated"  # obs, True for cells that were made; uns, how, one JSON string
IMPUTED = "scbin_imputed"  # layers, CSR float32: expected expression
IMPUTE = "impute"  # uns["scbin"]["impute"], how it was imputed, one JSON string
PREDICT = "predict"  # uns["scbin"]["predict"], what was predicted: classes and model by target, one JSON string
SPLIT = "scbin_split"  # obs, categorical: "train", "validation", "test"
SPLIT_RECORD = "split"  # uns["scbin"]["split"], how the cells were divided, one JSON string
PERTURB = "scbin_perturb"  # uns, {"table": one row per gene or pair, "params": one JSON string}
MEASURED = "scbin_perturbations"  # uns, measured perturbations: "table", "change", what else predicting needs, "params"
MEASURED_PREDICTED = "scbin_perturbations_predicted"  # uns, {"table": one row per perturbation and gene, "params"}
MEASURED_EVALUATED = "scbin_perturbations_evaluated"  # uns, {"table": one row per perturbation and method, "params"}
FINETUNE = "finetune"  # uns["scbin"]["finetune"], how the model was fine-tuned, one JSON string
SEARCH = "search"  # uns["scbin"]["search"], the trials of a search, a table
NETWORK = "scbin_network"  # varp, CSR float32 (genes, genes), from row to column; by group "scbin_network_0"; uns, how
AGE_GAP = "age_gap"  # uns["scbin"]["age_gap"], one row per donor (and group), a table
GENE_ROC = "gene_roc"  # uns["scbin"]["gene_roc"], mean ROC curves of classes of genes, a table
EVALUATE = "evaluate"  # uns["scbin"]["evaluate"], scores by target and method, a table


def of_tokens(entry: str, key: str) -> str:
    """Return the name in `uns["scbin"]` of an entry about the tokens in `obsm[key]`; those in `X_tokens` have the plain one."""
    return entry if key == TOKENS else f"{entry}_{key}"


def of_perturbation(key: str) -> tuple[str, str]:
    """Return the slots that belong to a perturbation in `uns[key]`.

    layers, CSR float32: shift of each cell by each gene, what is stored was perturbed, zeros too; obsm, float32 (cells, hidden):
    the embedding after a joint perturbation.
    """
    name = key.removesuffix("_perturb")
    return f"{name}_shift", f"X_{name}_perturbed"
