"""`coserve validate`: a real engine's recorded run against the simulation of exactly that engine.

    coserve validate RUN_FOLDER PROFILE_FOLDER --max-error 10 --max-tpot-error 1

The run folder gives the engine's settings, its K/V blocks, and when which prompt came and how long its
answer was; the profile folder gives the card's kernel times. The simulator serves those arrivals with the
shared loop, vLLM's scheduling and these times, and what it predicts is put beside what the engine's own
stamps say. Nothing is fitted on the run. Exits with 1 when an error is above a bound that was given.

An engine with prefix caching computes once, and holds in memory once, what two prompts have in common. A
run folder has no tokens, but names the workload that has them: with `--prompts FILE` (or the file in the
folder) the replay finds blocks as the engine does. Without it, `profiles.workloads` knows of a public
workload which prompts begin alike; those of any other are taken as unlike each other.
The recorded run of Llama-3.1-8B on an RTX 4090 is of such a workload, and shows what that is worth: its
conversations' later turns find 4,944 tokens, and every figure is within 1.7 %, mean TPOT within 0.3 %. Taken as
unlike each other, for 25 s, 22,604 tokens and 26 preemptions its logger's running requests, tokens and K/V blocks
are the replay's at every tick, to the last block, if the 0.36 s that the first iteration needed to warm up are
given. Then the engine begins a third prompt that the replay has no room for, and four figures are 3.5 to
9.4 % off.

The kernel times of that profile are of an eager engine and of equally long decodes. Over the 85 s of
iterations whose contents are known they are 0.9 % too long: 2 to 3 % where decodes are about equally long,
1.2 % where prompts are among them, and 1.5 to 3 % too short where the longest decode has three times the
mean.

Data parallelism is simulated as several engines, tensor parallelism with the times of its degree in the
profile (a folder tpN) and the links in `config.json`; LoRA, speculation, pipelines and mixtures of experts are
refused in one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from profiles.compare import Figure, Timeline, figures, timeline, windows
from profiles.named import bare, model_named
from profiles.workloads import Alike, known_workload, with_prompts
from sim.arguments import Parser, number, whole_number
from sim.core.specs import ModelShape
from sim.cost.operators import OperatorCost
from sim.vllm.profile import ProfileFolder, read_profile
from sim.vllm.replay import Replay, replay
from sim.vllm.run import RunFolder, read_run

FIGURE = "runs/%Y-%m-%d/%H-%M-%S-%f_validate/validation.png"
"""Where the figure goes by default, by the time: in a folder named as those of runs are."""

ABOVE_BOUND = 1
"""Exit code when the prediction is further off than allowed."""


def main(argv: Sequence[str]) -> int:
    """Compare, print, draw; returns the exit code."""
    arguments = _parser().parse_args(argv)
    run, known = recorded(arguments.run, arguments.prompts)
    profile = read_profile(arguments.profile, run.engine.tp)
    replayed = replay(run.engine, run.requests, cost_of(run, profile, arguments.layers))
    found = figures(run.requests, replayed)
    print(_heading(run, profile, replayed))
    lines = (*profile.notes, *_beyond(run, profile), *_caching(run, replayed, known))
    print("".join(f"{line}\n" for line in lines))
    print(_table(found))
    if run.ticks is None:
        print("\nno ticks in timeseries.csv: neither a timeline nor a figure")
        return _judge(found, arguments.max_error, arguments.max_tpot_error)
    line = timeline(run, replayed)
    print(_windows_table(line))
    code = _judge(found, arguments.max_error, arguments.max_tpot_error)
    from profiles.validation_figure import draw

    figure = arguments.figure or datetime.now().strftime(FIGURE)
    draw(Path(figure), run, replayed, line)
    print(f"\nfigure: {figure}")
    return code


def recorded(folder: Path, prompts: Path | None = None) -> tuple[RunFolder, Sequence[Alike] | None]:
    """The run, and what is known of its workload where the prompts themselves are not."""
    run = read_run(folder, prompts)
    known = None
    if run.requests.prompts is None and run.engine.prefix_caching:
        known = known_workload(run.requests)
    if known is None:
        return run, None
    return replace(run, requests=with_prompts(run.requests, known)), known


def cost_of(run: RunFolder, profile: ProfileFolder, layers: int | None = None) -> OperatorCost:
    """The card's times for the engine's model. Raises ValueError when the two do not belong together."""
    engine = run.engine
    if bare("model", profile.model) != bare("model", engine.model):
        raise ValueError(f"the profile is of {profile.model}, the run of {engine.model}")
    if profile.tp != engine.tp:
        raise ValueError(f"the profile is of tensor parallel degree {profile.tp}, the run of {engine.tp}")
    sizes = engine.graph_sizes
    return OperatorCost(
        profile.operators,
        layers=_shape(engine.model).layers if layers is None else layers,
        max_tokens=engine.max_tokens,
        decode_sizes=sizes if engine.graphs_for_decodes else (),
        mixed_sizes=sizes if engine.graphs_for_mixed else (),
        collective_s=_collectives(run) if engine.tp > 1 else None,
    )


def _collectives(run: RunFolder) -> Callable[[int], float]:
    """A layer's two all-reduces in a ring, since a profile of one device has none: 2 (g - 1) steps of a g-th
    of the tokens' hidden states (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009)."""
    link, tp = run.link, run.engine.tp
    if link is None:
        raise ValueError(
            f"tensor parallel degree {tp} needs the links: link_bw (GB/s) and link_latency (ns) in config.json "
            "beside meta.json"
        )
    shape = _shape(run.engine.model)
    token_bytes, steps = shape.hidden * shape.dtype_bytes, 2 * (tp - 1)
    token_s = steps / tp * token_bytes / link.bandwidth_bytes_s
    return lambda tokens: 2 * (steps * link.latency_s + tokens * token_s) if tokens else 0.0


def _shape(model: str) -> ModelShape:
    """A model that is described; ValueError says how to do without."""
    try:
        return model_named(model)
    except ValueError as error:
        raise ValueError(f"the layers of {model} are not known; give them with --layers: {error}") from None


def _heading(run: RunFolder, profile: ProfileFolder, replayed: Replay) -> str:
    engine, requests = run.engine, run.requests
    devices = "" if engine.replicas * engine.tp == 1 else f"{engine.replicas} x {engine.tp} x "
    return (
        f"{engine.model} on {devices}{profile.card}, vLLM {engine.version}: {len(requests.arrival_s)} requests, "
        f"{engine.kv_blocks} blocks of {engine.block_tokens} tokens; replayed in "
        f"{len(replayed.iterations['end_s'])} iterations with {replayed.preemptions} preemptions"
    )


def _beyond(run: RunFolder, profile: ProfileFolder) -> list[str]:
    """How far the profile goes, where the run goes further."""
    most = min(curve.counts[-1] for curve in profile.operators.dense.values())
    if run.engine.max_tokens <= most:
        return []
    return [
        f"iterations of up to {run.engine.max_tokens:,} tokens: the profile ends at {most:,}, beyond it is extrapolated"
    ]


def _caching(run: RunFolder, replayed: Replay, known: Sequence[Alike] | None) -> list[str]:
    """What is known of blocks that were found, and of preemptions."""
    lines = []
    if known is not None:
        lines.append(
            f"a public workload; prompts known to begin like an earlier one: {len(known)}; tokens of them found in "
            f"blocks: {replayed.found_tokens:,}"
        )
    if run.engine.prefix_caching and run.requests.prompts is None:
        lines.append("the prompts are not known (--prompts): what they have in common is not simulated")
    counts = {"prompt_cached_throughput": replayed.found_tokens, "preempted": replayed.preemptions}
    names = {"prompt_cached_throughput": "prompt tokens found in blocks", "preempted": "preemptions"}
    for column, predicted in counts.items():
        if run.ticks is not None and column in run.ticks:
            per_tick = run.tick_s if column == "prompt_cached_throughput" else 1.0
            measured = float(run.ticks[column].sum()) * per_tick
            lines.append(f"{names[column]}: {measured:,.0f} measured, {predicted:,} predicted")
    return lines


def _table(found: Sequence[Figure]) -> str:
    lines = [f"{'':<16}{'measured':>12}{'predicted':>12}{'error':>9}"]
    previous = ""
    for figure in found:
        kind = figure.name.partition(" ")[0]
        if previous and kind != previous:
            lines.append("")
        previous = kind
        unit, scale = ("", 1.0) if kind == "output" else (" ms", 1e3)
        numbers = f"{figure.measured * scale:>12.1f}{figure.predicted * scale:>12.1f}"
        lines.append(f"{figure.name + unit:<16}{numbers}{figure.error:>+9.1%}")
    return "\n".join(lines)


def _windows_table(line: Timeline) -> str:
    head = ("until s", "output tok/s", "prompt tok/s", "running", "waiting")
    lines = ["", "mean over time, measured / predicted", "".join(f"{name:>18}" for name in head)]
    for end_s, means in windows(line):
        cells = [
            f"{means[name][0]:.0f} / {means[name][1]:.0f}"
            for name in ("gen_tok_s", "prompt_tok_s", "running", "waiting")
        ]
        lines.append("".join(f"{cell:>18}" for cell in (f"{end_s:g}", *cells)))
    return "\n".join(lines)


def _judge(found: Sequence[Figure], max_error: float | None, max_tpot_error: float | None) -> int:
    """Print what is above its bound, in percent; returns the exit code."""
    above = []
    if max_error is not None:
        above += [(figure, max_error) for figure in found if not abs(figure.error) * 100 <= max_error]
    if max_tpot_error is not None:
        tpot = [figure for figure in found if figure.name == "TPOT mean"]
        above += [
            (figure, max_tpot_error) for figure in tpot if not abs(figure.error) * 100 <= max_tpot_error
        ]
    for figure, bound in above:
        print(f"above the bound: {figure.name} is off by {figure.error:+.1%}, allowed are {bound:g} %")
    return ABOVE_BOUND if above else 0


def _parser() -> Parser:
    parser = Parser(prog="coserve validate", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN_FOLDER",
        help="meta.json, requests.jsonl; timeseries.csv, config.json and the workload if there are",
    )
    parser.add_argument("profile", type=Path, metavar="PROFILE_FOLDER", help="meta.yaml, dense.csv, ...")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="the run's workload with input_tok_ids; default: the file that meta.json names, if it is in the folder",
    )
    parser.add_argument("--max-error", type=_percent, metavar="PERCENT", help="bound on every figure's error")
    parser.add_argument(
        "--max-tpot-error", type=_percent, metavar="PERCENT", help="bound on the error of the mean TPOT"
    )
    parser.add_argument(
        "--layers", type=whole_number, help="of the model, where configs/model does not describe it"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="default: a folder of its own below runs/"
    )
    return parser


def _percent(text: str) -> float:
    bound = number(text)
    if not bound >= 0:
        raise argparse.ArgumentTypeError(f"must be a percentage from 0, got {text}")
    return bound
