"""The eight GLUE tasks and tasks of one's own: columns, labels, recipes, metrics.

One more task like GLUE's is one more entry of TASKS; glue/files.py reads its files.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


@dataclass(frozen=True)
class Recipe:
    """What a job is trained with."""

    lr: float
    weight_decay: float  # torch's AdamW's: upstream's decoupled decay / lr
    epochs: int
    batch_size: int
    n_seeds: int = 1  # of SEEDS


@dataclass(frozen=True)
class Task:
    """A task; `sizes` are set for GLUE's own eight only."""

    name: str
    recipe: Recipe
    columns: tuple[tuple[str, ...], ...]  # text columns: the first set that the file has
    label_columns: tuple[str, ...]
    labels: tuple[str, ...] = ()  # in the hub's order; () for regression, or not read yet
    metrics: tuple[str, ...] = ("accuracy",)  # their mean is the score
    sizes: tuple[int, ...] = ()  # official rows: train, dev (MNLI: matched and mismatched)
    words: bool = False  # each word has a label

    @property
    def regression(self) -> bool:
        return self.metrics == ("spearman",)

    @property
    def devs(self) -> tuple[str, ...]:
        """The official names of its evaluation files."""
        return ("dev_matched", "dev_mismatched") if self.name == "MNLI" else ("dev",)


SEEDS = (19, 8364, 717, 10536, 90166)  # upstream's
SANE = Recipe(lr=4e-5, weight_decay=0.01, epochs=5, batch_size=16, n_seeds=3)  # as in cramming
OWN = Recipe(lr=5e-5, weight_decay=0.1, epochs=3, batch_size=32)
PAIR, BINARY = ("sentence1", "sentence2"), ("0", "1")
NLI, ENTAILED = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")
ACC_F1 = ("accuracy", "f1")
# Recipes: mosaicml/examples, yamls/finetuning/glue/mosaic-bert-base-uncased.yaml. Its decoupled
# decay is lr/10, so 0.1 for torch, except for RTE. QQP's official size is the hub's, which has
# dropped the broken rows.
TASKS = {task.name: task for task in (
    Task("MNLI", Recipe(5e-5, 0.1, 3, 48), (PAIR, ("premise", "hypothesis")),
         ("gold_label", "label"), NLI, sizes=(392_702, 9_815, 9_832)),
    Task("QQP", Recipe(3e-5, 0.1, 5, 16), (("question1", "question2"),), ("is_duplicate", "label"),
         BINARY, ACC_F1, sizes=(363_846, 40_430)),
    Task("QNLI", Recipe(1e-5, 0.1, 10, 16), (("question", "sentence"),), ("label",), ENTAILED,
         sizes=(104_743, 5_463)),
    Task("SST-2", Recipe(3e-5, 0.1, 3, 16, 3), (("sentence",),), ("label",), BINARY,
         sizes=(67_349, 872)),
    Task("CoLA", Recipe(5e-5, 0.1, 10, 32, 4), (("sentence",),), ("label",), BINARY, ("matthews",),
         sizes=(8_551, 1_043)),
    Task("RTE", Recipe(1e-5, 1.0, 3, 16, 5), (PAIR,), ("label",), ENTAILED, sizes=(2_490, 277)),
    Task("MRPC", Recipe(8e-5, 0.1, 10, 32, 5), (("#1 String", "#2 String"), PAIR),
         ("Quality", "label"), BINARY, ACC_F1, sizes=(3_668, 408)),
    Task("STS-B", Recipe(3e-5, 0.1, 10, 32, 5), (PAIR,), ("score", "label"), metrics=("spearman",),
         sizes=(5_749, 1_500)),
)}
METRICS = {
    "accuracy": accuracy_score, "f1": partial(f1_score, zero_division=0.0),
    "matthews": matthews_corrcoef, "pearson": lambda x, y: pearsonr(x, y).statistic,
    "spearman": lambda x, y: spearmanr(x, y).statistic}
FROM_MNLI = ("RTE", "MRPC", "STS-B")  # small, and better started from the model tuned on MNLI


def metric(name: str, y: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...] = (),
           lengths: list[int] | None = None) -> float:
    """accuracy, f1 (of class 1), matthews, pearson, spearman (what is constant correlates with
    nothing: 0), or entity_f1: of whole names (all their words, and their kind), as CoNLL-2003
    counts them, in sentences of `lengths` words."""
    if name == "entity_f1":
        from seqeval.metrics import f1_score as f1_of_entities

        y, predicted = ([part.tolist() for part in np.split(np.array(labels)[side],
                        np.cumsum(lengths)[:-1])] for side in (y, predicted))
        return float(f1_of_entities(y, predicted, zero_division=0))
    if name not in ("accuracy", "f1") and min(len(np.unique(y)), len(np.unique(predicted))) < 2:
        return 0.0
    return float(METRICS[name](y, predicted))


def evaluate(task: Task, y: dict[str, np.ndarray], predicted: dict[str, np.ndarray],
             lengths: dict[str, list[int]]) -> dict[str, float]:
    """Metrics by name (MNLI: accuracy_m and accuracy_mm; regression: pearson beside spearman), and
    "score": the mean of those in task.metrics, as upstream. y, predicted: (n,) for each dev;
    lengths: labels in each of its rows."""
    suffix = {"dev_matched": "_m", "dev_mismatched": "_mm"}
    metrics = {m + suffix.get(dev, ""): metric(m, y[dev], p, task.labels, lengths[dev])
               for dev, p in predicted.items() for m in task.metrics}
    score = float(np.mean(list(metrics.values())))
    if task.regression:
        metrics["pearson"] = metric("pearson", y["dev"], predicted["dev"])
    return {"score": score, **metrics}
