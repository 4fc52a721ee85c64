"""A sweep's records as results/<name>/leaderboard.md: a ranking for each budget, and which
differences are more than chance, by paired t-tests over the pretraining seeds that both have. With
the same seed they see the same documents in the same order, if batch_tokens and seq_len are the
same."""

import math
from collections import defaultdict
from itertools import combinations, product
from statistics import mean

from records import BUDGETS, hardware, paired_test, standard_error


def short(x: float) -> str:
    """2000000 -> "2M", 1.5e15 -> "1.5P"; three digits."""
    power = min(int(math.log10(max(x, 1)) + 1e-9) // 3, 7)
    return f"{x / 1000**power:.3g}{' KMBTPEZ'[power]}".strip()


def name_of(r: dict) -> str:
    """What is compared: "mosaic-tiny", a preset as it is, or "mosaic-tiny+adamw", its variant."""
    return r["preset"] + f"+{r['variant']}" * bool(r["variant"])


def with_error(values: list[float], digits: int) -> str:
    """Mean ± standard error of the mean; without the error for one value, – for none."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}" if values else "–"


def verdict(x: list[float], y: list[float], lower: bool) -> tuple[str, str]:
    """(p of the paired t-test, what it says of x against y). lower=True: smaller is better."""
    p, _, _ = paired_test(x, y)
    if math.isnan(p):
        return "–", "no test: one seed" if len(x) < 2 else "no test: the same difference for all"
    better = "better" if (mean(x) < mean(y)) == lower else "worse"
    return f"{p:.2g}", better if p < 0.05 else "not distinguishable"


def table(head: list[str], rows: list[list]) -> list[str]:
    rows = [head, ["---"] * len(head), *rows]
    return ["", *[f"| {' | '.join(map(str, row))} |" for row in rows], ""]


def leaderboard(rows: list[dict], failed: dict[str, str], title: str, command: str) -> str:
    """The report, from the rows of records.jsonl, one of a run at least, and {job: its error}."""
    values = defaultdict(lambda: defaultdict(dict))  # metric -> (budget, name) -> {seed: value}
    runs = defaultdict(dict)  # (budget, name) -> {seed: a row}
    for r in rows:
        key = r["budget"], name_of(r)
        values[r["metric"]][key][r["seed"]] = r["value"] * (1 if r["metric"] == "loss" else 100)
        runs[key][r["seed"]] = r
    tasks = [metric for metric in values if metric not in ("loss", "accuracy", "blimp")]
    score = defaultdict(dict)  # mean over the tasks, of the runs that have them all
    for key, seed in [(key, seed) for key, seeds in runs.items() for seed in seeds]:
        if tasks and all(seed in values[task][key] for task in tasks):
            score[key][seed] = mean(values[task][key][seed] for task in tasks)
    name = f"mean of {len(tasks)} tasks (%)" if len(tasks) > 1 else f"{''.join(tasks)} (%)"
    metrics = [(name, score, False, 2)] * bool(score)
    metrics += [("held-out loss (nats)", values["loss"], True, 4)]
    metrics += [("BLiMP (%)", values["blimp"], False, 1)] * bool(values["blimp"])
    on, revisions = {hardware(r) for r in rows}, {str(r["revision"]) for r in rows}
    text = [f"# {title}", "", f"`{command}`", "", "Mean ± standard error over pretraining seeds; "
            "costs of pretraining, with what a branch owes to its stem. On "
            f"{', '.join(sorted(on))}; revision {', '.join(sorted(revisions))}.", ""]
    budgets = sorted({budget for budget, _ in runs})
    for budget in budgets:
        _, first, lower, _ = metrics[0]
        of_seeds = {n: own for (b, n), own in first.items() if b == budget and own}
        most = max(map(len, of_seeds.values()), default=0)  # only with all seeds there is a rank
        place = {n: mean(own.values()) * (1 if lower else -1)
                 for n, own in of_seeds.items() if len(own) == most}
        names = sorted((n for b, n in runs if b == budget), key=lambda n: place.get(n, 1e9))
        lines = []
        for rank, n in enumerate(names, 1):
            own = list(runs[budget, n].values())
            means = [with_error([*v[budget, n].values()], digits) for _, v, _, digits in metrics]
            costs = [mean(r["gpu_seconds"] for r in own) / 3600, mean(r["dollars"] for r in own)]
            lines.append([rank if n in place else "–", n, *means, len(own),
                          f"{own[0]['n_params']:,}", short(own[0]["tokens"]),
                          f"{costs[0]:.3g}", f"{costs[1]:.2f}"])
        head = ["rank", "what", *[m[0] for m in metrics], "seeds", "parameters", "tokens"]
        text += [f"## {short(budget)} {BUDGETS[rows[0]['equal']]}"]
        text += table([*head, "device-hours", "dollars"], lines)
        if len(tasks) > 1:
            text += table(["%", *tasks], [[n, *[with_error([*values[t][budget, n].values()], 1)
                                                for t in tasks]] for n in names])
    what, tests = {name_of(r): r for r in rows}, []
    pairs = [(a, b) for a, b in combinations(what, 2) if what[a]["variant"] == what[b]["variant"]]
    pairs += [(a, r["preset"]) for a, r in what.items() if r["variant"]]  # against it as it is
    for (a, b), budget, (label, v, lower, digits) in product(pairs, budgets, metrics):
        if both := sorted(v[budget, a].keys() & v[budget, b].keys()):
            x, y = [[v[budget, n][seed] for seed in both] for n in (a, b)]
            gain = with_error([p - q for p, q in zip(x, y)], digits)
            tests.append([a, b, short(budget), label, gain, len(both), *verdict(x, y, lower)])
    if tests:
        text += ["## Does A beat B?", "", "A − B ± standard error; p of a paired t-test, not "
                 f"corrected for the number of comparisons, {len(tests)}."]
        text += table(["A", "B", "budget", "metric", "A − B", "n", "p", "A is"], tests)
    if failed:
        text += [f"## Failed: {len(failed)}", "", *[f"- {j}: {e}" for j, e in failed.items()], ""]
    return "\n".join(text)
