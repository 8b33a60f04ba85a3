# SPDX-License-Identifier: Apache-2.0
"""Search launch configs of vLLM's fused-MoE kernel on the GPU at hand (CUDA, ROCm).

    python -m benchmarks.speed.gpu_tune search OUT.jsonl --shapes int8:288:1280,int8:288:640 \\
        --seeds EARLIER.jsonl --minutes 8
    python -m benchmarks.speed.gpu_tune write OUT.jsonl… --configs FOLDER [--sums]

A cell is a shape (dtype, experts, width) at a token count. `search` measures what
OUT.jsonl lacks, one line a cell, until the minutes are over; run it again to go
on, on another GPU of the same name with another OUT, and give `write` all of them.
Of the first `--whole` shapes every candidate that fits is timed at ANCHORS, elsewhere
the best of the anchors around; of later ones the best of the two nearest shapes that
were measured, at the count that gives an expert as many rows. Candidates far behind
the best are dropped early. Each candidate's output is checked
against that of vLLM's default config. Times are of CUDA-graph replays of the whole
layer, fresh inputs and routing, uniform and skewed; the best has the least sum of
both.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

from benchmarks.speed.gpu_layer import (
    COUNTS,
    SKEW,
    Compiler,
    Graph,
    Key,
    Layer,
    Shape,
    as_config,
    as_key,
    calls_of,
    fits,
    grouped,
    read_cells,
    space,
    time_together,
)
from benchmarks.speed.triton_overlap import overlapping_products

ANCHORS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
# Largest relative difference from the default config's output. int8 products are
# exact; wgmma, which large tiles compile to, sums fp8 products in fewer bits.
TOLERANCE = {"int8": 0.01, "bf16": 0.01, "fp8": 0.03}
KEPT = 8
# Less than this over the default at every count is no file's worth.
GAIN = 1.05
# A config that serves more counts may be slower than the best by this.
SLACK = 1.02


class Search:
    def __init__(self, shape: Shape, compiler: Compiler, cells: dict) -> None:
        self.shape = shape
        self.compiler = compiler
        self.cells = cells  # (shape, tokens) -> {"best": [[key, uniform, skewed]]}
        self.layer = Layer(shape)

    def best_at(self, tokens: int, shape: str | None = None) -> list[Key]:
        cell = self.cells.get((shape or str(self.shape), tokens))
        return [tuple(key) for key, *_ in cell["best"]] if cell else []

    def candidates(self, tokens: int, seeds: list[Shape]) -> list[Key]:
        """Candidates at a count, the most promising first; seeds: shapes whose best
        ones are tried, or none: all that fit at ANCHORS."""
        lower = [c for c in ANCHORS if c < tokens]
        upper = [c for c in ANCHORS if c > tokens]
        near = [*lower[-1:], *upper[:1]]
        keys = [key for count in near for key in self.best_at(count)]
        for seed in seeds:
            count = nearest_count(tokens * self.shape.load / seed.load)
            keys += self.best_at(count, str(seed))
        if tokens in ANCHORS and not seeds:
            # GROUP_SIZE_M orders tiles of one product: tried on the best alone
            every = space(self.shape.dtype, self.compiler.target)
            keys += [key for key in every if fits(key, self.shape, tokens)]
        return list(dict.fromkeys(keys))

    def poison(self, tokens: int) -> None:
        """Leave NaN in the memory that the next call is given."""
        import torch

        s = self.shape
        rows = tokens * s.top_k
        for size in (rows * max(2 * s.N, s.hidden), rows * s.N, tokens * s.hidden):
            torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda")

    def difference(self, key: Key, inputs, expected) -> float:
        self.poison(inputs[0].shape[0])
        out = self.layer(as_config(key), inputs)
        # NaN compares as wrong; a rank may get no token at all
        norm = expected.norm().clamp(min=1e-9)
        return float((out.double() - expected).norm() / norm)

    def cell(self, tokens: int, seeds: list[Shape]) -> dict:
        """Measure one cell."""
        import torch

        layer = self.layer
        calls = calls_of(tokens)
        uniform = [layer.inputs(tokens, 0.0) for _ in range(calls)]
        skewed = [layer.inputs(tokens, SKEW) for _ in range(calls)]
        check = layer.inputs(tokens, SKEW)
        default = layer.default(tokens)
        expected = layer(default, check).double()
        quick = lambda config: Graph(  # noqa: E731
            lambda x: layer(config, x), [uniform[0], skewed[0]]
        )
        scores = {as_key(default): min(quick(default).times(4)[1:])}
        wrong: dict[Key, float] = {}
        worst = 0.0

        def score(keys: list[Key]) -> None:
            nonlocal worst
            for key in self.compiler(keys, self.shape, tokens):
                if key in scores or key in wrong:
                    continue
                try:
                    error = self.difference(key, check, expected)
                except Exception as problem:  # out of resources on this GPU
                    self.compiler.failed[key] = str(problem)[:200]
                    continue
                if not error <= TOLERANCE[self.shape.dtype]:
                    wrong[key] = error
                    continue
                worst = max(worst, error)
                graph = quick(as_config(key))
                first = min(graph.times(2)[1:])
                if first < 1.25 * min(scores.values()):
                    first = min(first, *graph.times(4)[1:])
                scores[key] = first

        score(self.candidates(tokens, seeds))
        ranked = sorted(scores, key=scores.get)
        if tokens >= 256:
            score([g for key in ranked[:4] if key[3] == 1 for g in grouped(key)])
            ranked = sorted(scores, key=scores.get)
        # A file serves all shapes of its name: the best of one are measured at each.
        namesakes = [seed for seed in seeds if (seed.E, seed.N) == (self.shape.E, self.shape.N)]
        shared = [key for seed in namesakes for key in self.best_at(tokens, str(seed))[: KEPT // 2]]
        score(shared)
        shared = [key for key in shared if key in scores]
        finalists = dict.fromkeys([*ranked[:KEPT], *shared, as_key(default)])
        graphs = {}
        for key in finalists:
            config = default if key == as_key(default) else as_config(key)
            for name, inputs in (("uniform", uniform), ("skewed", skewed)):
                graphs[key, name] = Graph(lambda x, c=config: layer(c, x), inputs)
        times = time_together(graphs, rounds=4)
        rows = [[key, times[key, "uniform"], times[key, "skewed"]] for key in finalists]
        rows.sort(key=lambda row: row[1] + row[2])
        del graphs
        torch.cuda.synchronize()
        error = None
        if self.shape.dtype == "int8":
            out = layer(as_config(rows[0][0]), check)[:4].double()
            exact = layer.reference(check, 4)
            error = float((out - exact).norm() / exact.norm().clamp(min=1e-9))
        return {
            "shape": str(self.shape),
            "tokens": tokens,
            "best": [[k, round(u, 2), round(s, 2)] for k, u, s in rows],
            "default": as_key(default),
            "tried": len(scores),
            "wrong": [[k, e] for k, e in wrong.items()],
            "largest difference": worst,
            "error against float64": error,
        }


def search(args: argparse.Namespace) -> None:
    import torch

    until = time.monotonic() + 60 * args.minutes
    target = args.target
    compiler = Compiler(target, args.workers)
    shapes = [Shape.parse(text) for text in args.shapes.split(",")]
    earlier = [Shape.parse(text) for text in args.seed_shapes]
    counts = [int(c) for c in args.counts.split(",")] if args.counts else COUNTS
    order = sorted(counts, key=lambda c: (c not in ANCHORS, c))
    for number, shape in enumerate(shapes):
        cells = read_cells([args.out, *args.seeds])
        stored = read_cells([args.out])
        todo = [c for c in order if (str(shape), c) not in stored]
        if not todo:
            continue
        names = {name for name, _ in cells}
        known = dict.fromkeys([*shapes[:number], *earlier])
        measured = [s for s in known if str(s) in names and s.dtype == shape.dtype]
        seeds = [] if number < args.whole else sorted(measured, key=shape.distance)[:2]
        one = Search(shape, compiler, cells)
        for tokens in todo:
            if time.monotonic() > until:
                print(f"stopped at {shape}, {tokens} tokens: run it again to go on")
                return
            started = time.monotonic()
            cell = one.cell(tokens, seeds)
            cells[cell["shape"], tokens] = cell
            name = torch.cuda.get_device_name()
            with args.out.open("a") as out:
                out.write(json.dumps({**cell, "device": name}) + "\n")
            _, u, s = cell["best"][0]
            d = next(r for r in cell["best"] if tuple(r[0]) == cell["default"])
            print(
                f"{shape} {tokens:5}: {u:8.1f} {s:8.1f} us, "
                f"{(d[1] + d[2]) / (u + s):.2f}x default, {cell['best'][0][0]} "
                f"of {cell['tried']} in {time.monotonic() - started:.1f} s, "
                f"{len(cell['wrong'])} wrong",
                flush=True,
            )
        del one
        torch.cuda.empty_cache()
    failed = compiler.failed
    print(f"{len(failed)} candidates failed", *list(failed.items())[:3], sep="\n  ")


def nearest_count(tokens: float) -> int:
    """That of COUNTS whose ratio to `tokens` is nearest to 1."""
    return min(COUNTS, key=lambda count: abs(math.log(count / tokens)))


def times_of(cell: dict) -> dict[Key, float]:
    """Microseconds of each candidate, uniform and skewed."""
    return {tuple(key): uniform + skewed for key, uniform, skewed in cell["best"]}


def gain(cells: list[dict], key: Key, over: Key | None = None) -> float:
    """The default's time, or that of `over`, over that of `key`: the least of `cells`.

    Where `over` is not among the last ones that were timed, the slowest of these stands for it.
    """
    gains = []
    for cell in cells:
        times = times_of(cell)
        base = over or tuple(cell["default"])
        slowest = max(times[one] for one in times if one != tuple(cell["default"]))
        gains.append(times.get(base, slowest) / times.get(key, slowest))
    return min(gains)


def losses_of(cells: list[dict], over: Key | None) -> dict[Key, float]:
    """Time over the best one's, where it is the most, of the candidates that were timed in all `cells` and are nowhere
    slower than the default or than `over`; of `over` alone where there is none."""
    times = [times_of(cell) for cell in cells]
    common = [key for key in times[0] if all(key in timed for timed in times)]
    common = [key for key in common if gain(cells, key) >= 1 and gain(cells, key, over) >= 1]
    if over and not common:
        return {over: 1.0}
    return {key: max(timed[key] / min(timed.values()) for timed in times) for key in common}


def choose_configs(losses: dict[int, dict[Key, float]]) -> dict[int, Key]:
    """A candidate for each count, few of them: each compiles when it is first launched, while someone waits.

    From the lowest count on, the one that stays within SLACK of the best for the most counts; of several the one with
    the least loss.
    """
    chosen: dict[int, Key] = {}
    counts = list(losses)
    while len(chosen) < len(counts):
        rest = counts[len(chosen) :]
        runs = {}
        for key in losses[rest[0]]:
            near = [losses[count].get(key, math.inf) <= SLACK for count in rest]
            length = max(1, (near + [False]).index(False))
            runs[key] = (-length, sum(losses[count].get(key, math.inf) for count in rest[:length]))
        key = min(runs, key=runs.get)
        chosen |= dict.fromkeys(rest[: -runs[key][0]], key)
    return chosen


def write(args: argparse.Namespace) -> None:
    """Write vLLM's config files from measured cells: one a shape and device, where any count gains GAIN over the
    default, or with --sums over what stands in the file without int32 sums."""
    # A name says nothing of the hidden size: models share one.
    files: dict[str, dict[int, dict[str, dict]]] = {}
    for file in args.results:
        for cell in read_cells([file]).values():
            dtype, experts, width, *_ = cell["shape"].split()
            if dtype != "int8":
                continue
            device = cell["device"].replace(" ", "_")
            if "H200" in device.split("_"):
                device = "NVIDIA_H200"
            suffix = ",sums=int32" if args.sums else ""
            name = f"{experts},{width},device_name={device},dtype=int8_w8a8{suffix}.json"
            # searches of one shape with different tritons count as two: a config has to be good in both
            files.setdefault(name, {}).setdefault(cell["tokens"], {})[f"{file} {cell['shape']}"] = cell
    for name, configs in sorted(files.items()):
        if missing := [c for c in COUNTS if c not in configs]:
            print(f"{name}: not written, not measured at {missing} tokens")
            continue
        plain = args.configs / name.replace(",sums=int32", "")
        known = json.loads(plain.read_text()) if args.sums and plain.exists() else {}
        over = {count: as_key(known[str(count)]) if known else None for count in COUNTS}
        chosen = choose_configs({count: losses_of([*configs[count].values()], over[count]) for count in COUNTS})
        gains = {count: gain([*configs[count].values()], key, over[count]) for count, key in chosen.items()}
        if max(gains.values()) < GAIN:
            print(f"{name}: not written, no count gains {GAIN - 1:.0%}")
            continue
        text = json.dumps({str(count): as_config(key) for count, key in chosen.items()}, indent=4) + "\n"
        new = args.configs / f".{name}.new"
        new.write_text(text)
        new.rename(args.configs / name)
        base = f"{plain.name}'s config" if known else "the default"
        print(f"{name}: {min(gains.values()):.2f}x to {max(gains.values()):.2f}x {base}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    one = sub.add_parser("search")
    one.add_argument("out", type=Path)
    one.add_argument("--shapes", required=True, help="dtype:E:N[:experts:hidden:top_k],…")
    one.add_argument("--counts", help="token counts, all of vLLM's by default")
    one.add_argument("--seeds", type=Path, nargs="*", default=[])
    one.add_argument("--seed-shapes", nargs="*", default=[], help="shapes of --seeds, as those of --shapes")
    one.add_argument("--whole", type=int, default=1, help="shapes whose candidates are all tried, from the first on")
    one.add_argument("--minutes", type=float, default=8)
    one.add_argument("--target", default="sm_90", help="sm_90, gfx942, gfx950")
    one.add_argument("--workers", type=int)
    one.add_argument("--overlap", action="store_true", help="of kernels whose products overlap (triton_overlap.py)")
    one.set_defaults(run=search)
    two = sub.add_parser("write")
    two.add_argument("results", type=Path, nargs="+")
    two.add_argument("--configs", type=Path, required=True)
    two.add_argument("--sums", action="store_true", help="found with 0016's int32 sums: under names of their own")
    two.set_defaults(run=write, overlap=False)
    args = parser.parse_args()
    with overlapping_products() if args.overlap else contextlib.nullcontext():
        args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
