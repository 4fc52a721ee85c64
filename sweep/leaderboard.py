"""A sweep's records as a report in Markdown: a ranking for each budget, and which differences are more than chance.

sweep.py writes it to results/<name>/leaderboard.md. "A beats B" is a paired t-test over the pretraining seeds that both
have; with the same seed they see the same documents in the same order, if batch_tokens and seq_len are the same.
"""

import math
from collections import defaultdict
from itertools import combinations, product
from statistics import mean, stdev

from records import BUDGETS


def short(x: float) -> str:
    """2000000 -> "2M", 1.5e15 -> "1.5P"; three digits."""
    power = min(int(math.log10(max(x, 1)) + 1e-9) // 3, 7)
    return f"{x / 1000**power:.3g}{' KMBTPEZ'[power]}".strip()


def with_error(values: list[float], digits: int) -> str:
    """Mean ± standard error of the mean; without the error for one value, – for none."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}" if values else "–"


def verdict(x: list[float], y: list[float], lower: bool) -> tuple[str, str]:
    """(p of the two-sided paired t-test, what it says of x against y). lower=True: smaller values are better."""
    if len(x) < 2:
        return "–", "one seed: no test"
    differences = [a - b for a, b in zip(x, y)]
    if max(differences) - min(differences) < 1e-9:  # scores of few examples: a spread of rounding errors is none
        return "–", "the same difference for every seed: no test"
    from scipy.stats import ttest_rel  # takes a second

    p = ttest_rel(x, y).pvalue
    better = "better" if (mean(x) < mean(y)) == lower else "worse"
    return f"{p:.2g}", better if p < 0.05 else "not distinguishable"


def table(head: list[str], rows: list[list]) -> list[str]:
    return ["", *[f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]]


def leaderboard(records: list[dict], failed: dict[str, str], title: str, command: str) -> str:
    """The report, from the rows of records.jsonl, at least one of them of a run, and {job: error} of what failed."""
    rows = [r for r in records if r["type"] == "sweep"]
    values: dict[str, dict] = defaultdict(lambda: defaultdict(dict))  # metric -> (budget, arm) -> {seed: value}
    runs: dict[tuple, dict] = defaultdict(dict)  # (budget, arm) -> {seed: a row}
    for r in rows:
        share = 1 if r["metric"] == "loss" else 100
        values[r["metric"]][r["budget"], r["arm"]][r["seed"]] = share * r["value"]
        runs[r["budget"], r["arm"]][r["seed"]] = r
    tasks = [metric for metric in values if metric not in ("loss", "accuracy")]
    score: dict[tuple, dict] = defaultdict(dict)  # mean over the tasks, of the runs that have them all
    for key, seed in [(key, seed) for key, seeds in runs.items() for seed in seeds]:
        if tasks and all(seed in values[task][key] for task in tasks):
            score[key][seed] = mean(values[task][key][seed] for task in tasks)
    name = f"mean of {len(tasks)} tasks (%)" if len(tasks) > 1 else f"{''.join(tasks)} (%)"
    metrics = [(name, score, False, 2)] * bool(score) + [("held-out loss (nats)", values["loss"], True, 4)]
    budgets = sorted({budget for budget, _ in runs})
    about = (
        "Mean ± standard error over pretraining seeds. Costs are of pretraining, as logged, with what a branch owes "
    )
    text = [f"# {title}", "", f"`{command}`", "", f"{about}to its stem.", ""]

    for budget in budgets:
        _, first, lower, _ = metrics[0]
        own_seeds = {a: v for (b, a), v in first.items() if b == budget and v}
        most = max(map(len, own_seeds.values()), default=0)  # only arms with all seeds have a rank; the others follow
        place = {a: mean(v.values()) * (1 if lower else -1) for a, v in own_seeds.items() if len(v) == most}
        head = ["rank", "what", *[m[0] for m in metrics], "seeds", "parameters", "tokens", "FLOPs", "device-hours"]
        lines = []
        for rank, arm in enumerate(sorted([a for b, a in runs if b == budget], key=lambda a: place.get(a, 1e9)), 1):
            own = list(runs[budget, arm].values())
            line = [rank if arm in place else "–", arm]
            line += [with_error([*v[budget, arm].values()], digits) for _, v, _, digits in metrics]
            line += [len(own), f"{own[0]['n_params']:,}", short(own[0]["tokens"]), f"{own[0]['flops']:.2e}"]
            line += [f"{mean(r['gpu_seconds'] for r in own) / 3600:.3g}", f"{mean(r['dollars'] for r in own):.2f}"]
            line += [", ".join(sorted({f"{r['world_size']} × {r['device']}" for r in own}))]
            lines.append([*line, ", ".join(sorted({str(r["revision"]) for r in own}))])
        text += [f"## {short(budget)} {BUDGETS[rows[0]['equal']]}"]
        text += [*table([*head, "dollars", "hardware", "revision"], lines), ""]
        if len(tasks) > 1:
            by_task = [
                [line[1], *[with_error([*values[t][budget, line[1]].values()], 1) for t in tasks]] for line in lines
            ]
            text += [*table(["%", *tasks], by_task)[1:], ""]

    arms = {r["arm"]: r for r in rows}
    pairs = [(a, b) for a, b in combinations(arms, 2) if arms[a]["variant"] == arms[b]["variant"]]  # presets
    pairs += [(a, r["preset"]) for a, r in arms.items() if r["variant"]]  # variants against the preset as it is
    tests = []
    for (a, b), budget, (label, v, lower, digits) in product(pairs, budgets, metrics):
        x, y = v[budget, a], v[budget, b]
        if both := sorted(x.keys() & y.keys()):
            x, y = [x[seed] for seed in both], [y[seed] for seed in both]
            gain = with_error([p - q for p, q in zip(x, y)], digits)
            tests.append([a, b, short(budget), label, gain, len(both), *verdict(x, y, lower)])
    if tests:
        note = (
            f"A − B ± standard error; p of a paired t-test, not corrected for the number of comparisons, {len(tests)}."
        )
        head = ["A", "B", "budget", "metric", "A − B", "n", "p", "A is"]
        text += ["## Does A beat B?", "", note, *table(head, tests), ""]
    timed = [r for r in records if r["type"] == "speed"]
    speeds = [
        [r["arm"], ", ".join(f"{s:,.0f}" for s in r["tok_per_s"]), f"{r['ratio']:.3f}" if r["ratio"] else "–"]
        for r in timed
    ]
    speeds = [[*line, f"{r['flops_per_token']:.3g}"] for line, r in zip(speeds, timed)]
    head = ["what", "tokens/s, each round", "against the first", "FLOPs per token"]
    text += ["## Speeds, measured in turns before the sweep", *table(head, speeds), ""]
    if failed:
        text += [f"## Failed: {len(failed)}", "", *[f"- {job}: {error}" for job, error in failed.items()], ""]
    commands = {r["run"]: r["command"] for r in rows if r["seed"] == rows[0]["seed"]}
    text += ["## Commands of the first seed", "", *[f"- {run}: `{line}`" for run, line in commands.items()]]
    return "\n".join(text) + "\n"
