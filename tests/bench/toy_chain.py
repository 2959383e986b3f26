"""All stages and tasks on the toy world, with their baselines: the numbers of the README.

    python tests/bench/toy_chain.py --out OUT [--threads 2 --only video,detect]

What stands in OUT/results.jsonl is not run again: a stopped chain goes on with the same command.
"""

import re
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from common import Results, last_json, make_parser, run_program, side_by_side

# name: (program, the run whose weights it starts from)
RUNS = {
    "mae": ("mae_pretrain.py", None),
    "weak": ("weak_pretrain.py", "mae"),
    "weak from scratch": ("weak_pretrain.py", None),
    "classify": ("finetune.py --task classify", "weak"),
    "classify from scratch": ("finetune.py --task classify", None),
    "linear": ("finetune.py --task linear", "weak"),
    "lowshot": ("finetune.py --task lowshot", "weak"),
    "video": ("finetune.py --task video", "weak"),
    "video from scratch": ("finetune.py --task video", None),
    "video of one frame": ("finetune.py --task video --stride 0", "weak"),
    "detect": ("finetune.py --task detect", "mae"),
    "detect from scratch": ("finetune.py --task detect", None),
    "lit": ("finetune.py --task lit --pool mean --context 40 --cache-features", "weak"),
    "zero-shot": ("tests/bench/composition.py --pictures 2048", "lit"),
}


def measure(out, seed, threads, name):
    """Run one program, unless it has been run, and add its numbers to the results."""
    (program, start), results = RUNS[name], Results(out)
    row = {"run": name, "seed": seed, "threads": threads}
    if results.has(row):
        return
    flags = ["--checkpoint" if name == "zero-shot" else "--init"] if start else []
    flags += [folder_of(out, start, seed, 1) / "model.pt"] if start else []
    folder = folder_of(out, name, seed, threads)
    begun = folder.exists()  # then its seconds would not be those of the whole run
    if name != "zero-shot":
        flags += ["--seed", seed, "--out", folder]
    began = time.perf_counter()
    printed = run_program(Path(out, f"seed{seed}.log"), program, *flags, threads=threads)
    row["seconds"] = None if begun else round(time.perf_counter() - began)
    results.add(row | numbers(printed, folder))


def folder_of(out, name, seed, threads):
    return Path(out, f"{name.replace(' ', '-')}-{seed}-{threads}")


def numbers(printed, folder):
    """{name: number in %} of what a program has measured."""
    found = re.findall(r"^ *([a-z][\w ,]*?) +(?:top-1 +)?(\d+\.\d+)%", printed, re.MULTILINE)
    found = {name: float(value) for name, value in found}
    last = printed.strip().splitlines()[-1]
    metrics = folder / "metrics.jsonl"
    known = last_json(last) if last.startswith("{") else {}
    known |= last_json(metrics.read_text()) if metrics.exists() else {}
    for kind, top1 in known.get("top1", {}).items() if "lowshot" in last else ():
        found |= {f"{kind}, {shots} labels": 100 * value for shots, value in top1.items()}
    for name, value in known.items():
        if re.fullmatch(r"top1|hit_\w+|(bbox|segm)_AP(50)?|\w+_recall_at_1", name):
            found |= {name: 100 * value} if isinstance(value, float) else {}
    return found


def table(rows):
    """Print means and deviations over the seeds, one line a number."""
    print("| run | threads | number | mean ± deviation | of each seed | seconds |")
    print("|---|---|---|---|---|---|")
    groups = {}
    for row in rows:
        groups.setdefault((row["run"], row["threads"]), []).append(row)
    for (name, threads), group in sorted(
        groups.items(), key=lambda item: [*RUNS].index(item[0][0])
    ):
        for number in [n for n in group[0] if n not in ("run", "seed", "threads", "seconds")]:
            values = [row[number] for row in sorted(group, key=lambda row: row["seed"])]
            spread = f"{stdev(values):.1f}" if len(values) > 1 else "one run"
            each = ", ".join(f"{v:.1f}" for v in values)
            seconds = [row["seconds"] for row in group if row["seconds"]] or [0]
            line = f"{name} | {threads} | {number} | {mean(values):.1f} ± {spread} | {each}"
            print(f"| {line} | {mean(seconds):.0f} |")


def chain(out, seed, threads, only):
    for name in RUNS:
        if not only or name in only:
            measure(out, seed, threads, name)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--threads", type=int, default=1, help="of a run; its --init is of one thread"
    )
    parser.add_argument("--only", help="names of RUNS, between commas")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once")
    arguments = parser.parse_args()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    only = arguments.only and arguments.only.split(",")
    if unknown := set(only or ()) - set(RUNS):
        parser.error(f"--only {', '.join(unknown)}: want some of {', '.join(RUNS)}")
    seeds = map(int, arguments.seeds.split(","))
    chains = [partial(chain, arguments.out, seed, arguments.threads, only) for seed in seeds]
    side_by_side(arguments.jobs, chains)
    table(Results(arguments.out).rows())


if __name__ == "__main__":
    main()
