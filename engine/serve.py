"""`coserve serve`: the OpenAI API over a model, and a finetuning job beside it, on the same weights.

    coserve serve weights=FOLDER device=h100
    coserve serve weights=FOLDER device=h100 train=job.yaml policy=coserving_slack trace=today.csv
    curl localhost:8000/v1/completions -d '{"prompt": "Once", "max_tokens": 20}'

The loop and the policies are those of `coserve bench`; requests come over HTTP, from a process of its own
(`engine.front`). `train` is a file with the keys of `coserve finetune`, whose log, checkpoints and adapter come
out in the same places; answers wait neither for them nor for the job's end. Ctrl-C or SIGTERM takes no more
requests and waits `drain_s` for those under way; finetune with `resume: true` goes on from the last checkpoint.
"""

from __future__ import annotations

import inspect
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from engine.bench_loaded import table_of
from engine.bench_spec import seconds_of
from engine.config import read_config
from engine.driver import Driver, EngineArrivals, WallClock
from engine.engine import Engine, StepRecord
from engine.front_process import GRACE_S, FrontProcess, front_process
from engine.launching import LaunchSettings
from engine.live import SLO, TRACE_COLUMNS, LiveArrivals
from engine.load import check_model_folder, load_model
from engine.lora import read_adapter
from engine.machine import place_of, release
from engine.measure import first_uses, measure
from engine.messages import Serving
from engine.replica import Replica, replica
from engine.room import limits_and_plans
from engine.saver import Frozen, Saver
from engine.training import CONFIGS as PROGRAMS
from engine.training import Training
from engine.training_settings import DTYPES
from engine.training_settings import Settings as TrainingSettings
from sim.checked import build, locate
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.rows import Recorder
from sim.core.specs import DeviceSpec, LoraSpec
from sim.core.state import PipelineState
from sim.cost.iteration import IterationCost
from sim.errors import USER_ERROR, FailedInPart, Terminated, keys_as, nearest, writing
from sim.hydra_app import hydra_main
from sim.policy_node import policy_node, policy_of
from sim.settings import LimitSettings, slos_of
from sim.unread import check_bounds, refuse_needless, refuse_unread

CONFIGS = Path(__file__).parent / "configs"
UNREAD = ("peak_s", "run", "job")
"""Keys that the `scale` group brings for `coserve bench`."""
MEASURES = ("eval_dataset", "val_size", "eval_steps")
"""Keys of `coserve finetune` for what takes as long as its samples are."""
OWN = ("model_name_or_path", "device", "tp", "dtype", "policy")
"""Keys of it that are the server's here."""
TWICE_S = 0.5
"""In which two signals are one: supervisors send it to the process, and to its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of serve.yaml that are not a group."""

    weights: str
    name: str | None
    adapters: dict[str, str]
    dtype: str | None
    tp: int
    train: str | None
    host: str
    port: int
    max_requests: int
    drain_s: int
    trace: str | None
    predictor: str | None
    memory_utilization: float

    def __post_init__(self) -> None:
        with keys_as({"model_name_or_path ": "weights "}):
            check_model_folder(self.weights)
        if self.name is not None and not self.name.strip():
            raise ValueError("name must be text or null, got nothing")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be null or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for key, least, most in (
            ("tp", 1, 2**10),
            ("port", 0, 2**16 - 1),
            ("max_requests", 1, 2**20),
            ("drain_s", 0, 86_400),
        ):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key} must be from {least} to {most}, got {getattr(self, key)}")

    @property
    def shown(self) -> str:
        """The model's name in the API."""
        return Path(self.weights).resolve().name if self.name is None else self.name


def main(argv: Sequence[str]) -> int:
    """`coserve serve`."""
    if {"-m", "--multirun"} & set(argv):
        print("coserve serve: error: -m is for runs that end; a server is one at a time", file=sys.stderr)
        return USER_ERROR
    return hydra_main(
        serve, argv, prog="coserve serve", config_name="serve", config_dir=CONFIGS, at_end=_show
    )


def serve(config: DictConfig) -> dict[str, Any]:
    """Answer requests of the OpenAI API, and finetune beside them, until it is stopped."""
    import starlette  # noqa: F401 - what is missing is told before the model is loaded
    import uvicorn  # noqa: F401

    refuse_unread(UNREAD, "coserve bench")
    refuse_needless(config)
    plain = {key: config[key] for key in Settings.__dataclass_fields__}
    with keys_as({"serve.": ""}):
        settings: Settings = build(Settings, OmegaConf.create(plain), "serve")
    device: DeviceSpec = build(DeviceSpec, config.device, "device")
    place = place_of(device)
    training = _training(settings, place)
    names = [*settings.adapters, *([] if training is None else [training.job.id])]
    if len({settings.shown, *names}) <= len(names):
        given = ", ".join([settings.shown, *names])
        raise ValueError(f"the model, each adapter and the job need names of their own, got {given}")
    with ExitStack() as stack:
        listening = stack.enter_context(_bound(settings.host, settings.port))
        address = _url(listening)
        trace = None if settings.trace is None else stack.enter_context(_trace(settings.trace))
        front = stack.enter_context(front_process(settings.weights, listening))
        ranks = stack.enter_context(replica(settings.tp, place))
        return _Server(settings, config, device, training, ranks, front).run(address, trace)


class _Server:
    """The model with what is served and trained on it."""

    def __init__(
        self,
        settings: Settings,
        config: DictConfig,
        device: DeviceSpec,
        training: Training | None,
        ranks: Replica,
        front: FrontProcess,
    ) -> None:
        self._settings = settings
        self._front = front
        self._training = training
        shape = read_config(settings.weights).shape
        shape.check_tp(settings.tp)
        self._slos = slos_of(config)
        check_bounds(config)
        if SLO not in self._slos:
            own = ", ".join(self._slos)
            raise ValueError(f"slo must have a class named {SLO}, which requests are of, got {own}")
        launch = build(LaunchSettings, config.launch, "launch")
        given = build(LimitSettings, config.limits, "limits")
        measure_s = seconds_of(config, "measure_s")
        self._adapters = {name: read_adapter(folder, shape) for name, folder in settings.adapters.items()}
        node = policy_node(config.policy)
        target = locate(node.get("_target_"), "policy")
        _check_policy(target, target, training is not None)

        self._model = ranks.load(load_model, settings.weights, DTYPES[_dtype(settings, ranks.device.type)])
        jobs = [] if training is None else [training.job]
        limits, plans = limits_and_plans(self._model, device, given, jobs, settings.memory_utilization)
        self._limits = replace(limits, max_sequence_tokens=_longest(limits, shape.max_context_tokens))
        self._jobs = [replace(job, plan=plans[job.id]) for job in jobs]
        self._assemble = partial(ranks.assemble, launching=launch.on(self._model))
        front.await_ready()  # it must not share the processor with what is timed
        self._policy = self._made(node, device, measure_s)
        _check_policy(self._policy, target, training is not None)

    def run(self, url: str, trace: TextIO | None) -> dict[str, Any]:
        """Serve at `url` until somebody stops it; the row of what was done."""
        settings, training, front = self._settings, self._training, self._front
        recorder, horizon = Recorder(), Horizon()
        saver = Saver(_note)
        live = LiveArrivals(front.link, horizon, recorder, self._slos[SLO], saver.fail, trace)
        engine, counted = self._assemble(
            self._model, self._limits, self._jobs, self._adapters, on_token=live.on_token
        )
        engine.on_lost = live.on_lost
        engine.warm_up(adapters=bool(self._adapters or self._jobs))
        state = PipelineState(limits=self._limits, slos=self._slos, recorder=recorder, jobs=counted)
        arrivals = EngineArrivals(live, engine, live.prompt)
        with ExitStack() as stack:
            if training is not None:
                stack.enter_context(_trained(training, engine, saver))
            stack.callback(front.end)
            front.serve(self._serving())
            print(f"{settings.shown}: {url}", flush=True)
            clock = WallClock()
            driver = Driver(engine, clock)
            live.start(clock, driver, state)
            with _stopping(live, front, settings.drain_s) as stop:
                driver.run(run_loop(state, self._policy, arrivals, horizon))
            live.tell()
        saver.finish()
        if not stop.asked:
            raise ChildProcessError(f"the HTTP process ended by itself, with code {front.exit_code}")
        metrics = live.metrics
        row: dict[str, Any] = {"counts": metrics.counts, "latency": metrics.describe(), "ways_on": None}
        if training is not None:
            ended = engine.trainers[training.job.id].optimizer.steps == training.total
            row["ways_on"] = None if ended else f"{training.folder}: {training.ways_on()}"
        if saver.failures:
            raise FailedInPart("; ".join(saver.failures), row)
        return row

    def _serving(self) -> Serving:
        settings = self._settings
        return Serving(
            name=settings.shown,
            adapters=(*self._adapters, *(job.id for job in self._jobs)),
            vocab=self._model.whole.shape.vocab,
            longest_tokens=self._limits.max_sequence_tokens,
            max_requests=settings.max_requests,
        )

    def _made(self, node: dict[str, Any], device: DeviceSpec, measure_s: float) -> Policy:
        """The policy, with a predictor if it asks for one."""
        asked = "predictor" in inspect.signature(locate(node["_target_"], "policy")).parameters
        predictor = self._predictor(device, measure_s) if asked else None
        if predictor is None or self._settings.predictor is not None:
            first_uses(self._model, self._limits, self._jobs, self._assemble)
        release()
        return policy_of(node, predictor, self._slos)

    def _predictor(self, device: DeviceSpec, measure_s: float) -> IterationCost:
        if self._settings.predictor is None:
            return measure(self._model, self._limits, self._jobs, measure_s, self._assemble)
        lora = LoraSpec() if self._training is None else self._training.settings.lora
        return table_of(self._settings.predictor, device, self._model, lora, self._limits)


def _longest(limits: Limits, context_tokens: int) -> int:
    """Tokens of a prompt and its answer; what leaves fewer than `max_sequence_tokens` is told."""
    given = limits.max_sequence_tokens
    pages = limits.kv_tokens // limits.block_tokens * limits.block_tokens
    most, why = min((context_tokens, "the model's context"), (pages, "what limits.kv_tokens holds"))
    if most >= given:
        return given
    _note(f"limits.max_sequence_tokens is {given:,}, but a prompt and its answer have {most:,} tokens: {why}")
    return most


def _check_policy(policy: object, target: Any, trains: bool) -> None:
    """Refuse a policy that cannot run here, or its class `target` where that says so before a model is loaded; what a
    class does not say, its objects do."""
    if hasattr(policy, "assign"):
        raise ValueError(f"policy {target.__name__} splits several pipelines, and a server is one")
    if not getattr(policy, "serves", True):
        raise ValueError(f"policy must be one that serves, got {target.__name__}")
    if trains and not getattr(policy, "finetunes", True):
        raise ValueError(f"policy must be one that finetunes, got {target.__name__}")


@contextmanager
def _trained(training: Training, engine: Engine, saver: Saver) -> Iterator[None]:
    """The job's log, checkpoints and adapter, for which the loop never waits and never ends."""
    with training.on(engine, saver):
        log = engine.on_step
        assert log is not None

        def on_step(record: StepRecord) -> None:
            saver.guarded(log, record)
            engine.steps.clear()  # a server has no end at which they would be read
            if record.step == training.total:
                saver.submit(training.write, Frozen(engine, training.job.id))
                _note(f"job {training.job.id}: all {training.total} steps are done")

        engine.on_step = on_step
        if engine.trainers[training.job.id].optimizer.steps == training.total:
            # Stopped between its last checkpoint and its adapter.
            saver.submit(training.write, Frozen(engine, training.job.id))
        engine.on_failure = lambda record: saver.fail(record.failure)
        yield


class _Stop:
    """Whether somebody asked the server to stop."""

    asked = False
    at_s = 0.0


@contextmanager
def _stopping(live: LiveArrivals, front: FrontProcess, drain_s: int) -> Iterator[_Stop]:
    """The first Ctrl-C or SIGTERM inside lets running answers end, the second ends at once, unless it is the first once
    more. The HTTP process that has not hung up long after it should have is ended."""
    stop = _Stop()
    late = threading.Timer(drain_s + 2 * GRACE_S, front.kill)

    def asked(number: int, frame: object) -> None:
        if stop.asked:
            if time.monotonic() - stop.at_s < TWICE_S:
                return
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        stop.asked, stop.at_s = True, time.monotonic()
        _note(f"stopping: up to {drain_s} s for the answers under way, again to stop now")
        live.stop(drain_s)
        late.start()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        late.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of its own before anything takes time; clients reach it when the server listens."""
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listening = stack.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError as error:
            raise ValueError(f"host {host}, port {port}: {error.strerror}") from None
        yield listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@contextmanager
def _trace(path: str) -> Iterator[TextIO]:
    """A new trace. Its times count from when the server listens, so one that is there cannot go on. One without
    requests is taken away."""
    with writing("trace", path):
        try:
            file = Path(path).open("x", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileExistsError:
            raise ValueError(f"trace: {path} exists; choose another file") from None
    with file:
        file.write(",".join(TRACE_COLUMNS) + "\n")
        file.flush()
        empty = file.tell()
        try:
            yield file
        finally:
            if Path(path).stat().st_size == empty:
                Path(path).unlink()


def _training(settings: Settings, place: str) -> Training | None:
    """The job that the file `train` describes."""
    if settings.train is None:
        return None
    path = settings.train
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise ValueError(f"train: {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"train: {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"train: {path} is not UTF-8 at byte {error.start}") from None
    if not isinstance(given, DictConfig):
        raise ValueError(f"train: {path} must hold keys of coserve finetune")
    for key in OWN:
        if key in given:
            raise ValueError(f"{path}: {key} is for coserve finetune; a server has its own")
    for key in MEASURES:
        if key in given:
            raise ValueError(f"{path}: {key} is for coserve finetune; a server would answer nobody meanwhile")
    node = OmegaConf.to_container(OmegaConf.load(PROGRAMS / "finetune.yaml"), resolve=False)
    assert isinstance(node, dict)
    for key in ("defaults", "hydra", "policy"):
        del node[key]
    own = [key for key in map(str, node) if key not in (*OWN, *MEASURES)]
    for key in map(str, given):
        if key not in own:
            raise ValueError(f"{path} has no key {key!r}{nearest(key, own)}; known: {', '.join(own)}")
    node |= {str(key): value for key, value in given.items()}
    node |= {"model_name_or_path": settings.weights, "tp": settings.tp, "device": place}
    node["dtype"] = _dtype(settings, place)
    for key in ("dataset", "output_dir"):
        if node[key] == "???":
            raise ValueError(f"{path}: {key} is missing")
    with keys_as({"finetune ": f"{path} ", "finetune.": f"{path}: "}):
        return Training(build(TrainingSettings, node, "finetune"))


def _dtype(settings: Settings, place: str) -> str:
    return settings.dtype or ("float32" if place == "cpu" else "bfloat16")


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _show(rows: Sequence[Mapping[str, Any]], _: Path) -> None:
    for row in rows:
        counts = row["counts"]
        print(
            f"{counts['coserve_requests_finished_total']:,.0f} requests answered, "
            f"{counts['coserve_generated_tokens_total']:,.0f} tokens generated, "
            f"{counts['coserve_finetune_trained_tokens_total']:,.0f} trained"
        )
        if cut := sum(counts[f"coserve_requests_{how}_total"] for how in ("aborted", "unfinished")):
            print(f"{cut:,.0f} requests cut short by their clients or by the end")
        for key in ("latency", "ways_on"):
            if row[key] is not None:
                print(row[key])
