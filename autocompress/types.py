"""The words of the house as frozen records (floor F0): no behaviour beyond derived values, no heavy import.

Every record forbids unknown fields, so a misspelt key is an error where it is written, not a silent default
where it is read. Times are milliseconds unless a name says otherwise, shares and drops are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

Choice = bool | int | float | str
"""One value of a gene."""
Genotype = tuple[int, ...]
"""One choice index per gene, in the order of the space."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Record(BaseModel):
    """Frozen, no unknown fields, equal by value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- the question: space, gene, candidate ---------------------------------------------------------------------


class Gene(Record):
    """One knob. The first choice leaves the parent alone.

    `when` maps other genes' names to the choices under which this gene means anything; a gene that does not apply
    is set to its first choice in the canonical form, so it cannot make a different candidate.
    """

    name: str
    kind: Literal["arch", "policy"]
    choices: tuple[Choice, ...] = Field(min_length=1)
    when: dict[str, tuple[Choice, ...]] = {}
    site: str = ""  # policy genes only: module name in the unmodified network, "." for the whole network
    op: str = ""
    param: str = ""


class Rule(Record):
    """One line of a policy: apply `op` to `site` with `settings` (ratio, bits, rank ...)."""

    site: str
    op: str
    settings: dict[str, Choice]


class Space(Record):
    """The joint space, expanded: one gene per knob of the architecture and per (site, op, param) of the policy.

    `always` are rules of every candidate's policy: how all are taught, say.
    """

    name: str
    genes: tuple[Gene, ...]
    always: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        seen: dict[str, Gene] = {}
        for gene in self.genes:
            if gene.name in seen:
                raise ValueError(f"gene {gene.name!r} occurs twice")
            for other in gene.when:
                if other not in seen:
                    raise ValueError(f"gene {gene.name!r}: `when` names {other!r}, which is not an earlier gene")
            seen[gene.name] = gene
        asked = {(gene.site, gene.op) for gene in self.genes}
        for rule in self.always:
            if (rule.site, rule.op) in asked:
                raise ValueError(f"`always` and a gene both speak of {rule.op} at {rule.site!r}")
        return self


class Policy(Record):
    """The compression policy of one candidate: rules in the order of the space."""

    rules: tuple[Rule, ...] = ()

    def of(self, op: str) -> tuple[Rule, ...]:
        """The rules of one op."""
        return tuple(rule for rule in self.rules if rule.op == op)


class Candidate(Record):
    """A decoded genotype: what to build and how to compress it."""

    arch: dict[str, Choice]
    policy: Policy


# --- targets: profile, budget, goal ---------------------------------------------------------------------------


class Numeric(Record):
    """How integers are computed on a target; profiles with equal settings share one variant (file).

    The activation type decides whether convolutions fuse: with the wrong one int8 is slower than fp32.
    """

    activation: Literal["uint8", "int8"] = "uint8"
    weight: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"

    @property
    def variant(self) -> str:
        """Short name of the file these settings make, e.g. `u8s8-pc-minmax`."""
        short = {"uint8": "u8", "int8": "s8"}
        reduced = "-rr" if self.reduce_range else ""
        scheme = "pc" if self.per_channel else "pt"
        return f"{short[self.activation]}{short[self.weight]}-{scheme}{reduced}-{self.calibration}"


class Reach(Record):
    """How a target that is not this host is reached."""

    ssh: str = ""  # user@host, or a Host of the user's ssh configuration
    port: int | None = Field(default=None, ge=1, le=65535)
    identity: str = ""  # file of a private key; empty: what ssh finds
    adb: str = ""  # serial number of a phone
    resource: str = ""  # that a node of the Ray cluster holds, e.g. device:pi
    python: str = "python3"  # with numpy and onnxruntime, over there
    folder: str = ".cache/autocompress"  # for files over there, relative to the home folder


class Profile(Record):
    """YAML facts of a target device."""

    name: str
    about: str = ""
    device: str = "local"  # which device plug-in reaches it
    provider: str = "CPUExecutionProvider"
    provider_options: dict[str, str] = {}
    threads: int = Field(default=1, ge=0)  # 0: all that the target has, one per physical core
    batch: int = Field(default=1, ge=1)
    numeric: Numeric = Numeric()
    channel_multiple: int = Field(default=1, ge=1)
    opset: int = Field(default=17, ge=13)
    types: tuple[str, ...] = ("float32", "int8")  # what it computes with; `float16` and `bfloat16` where they run
    expects: tuple[str, ...] = ()  # flags of the processor, or architecture, or system; `a|b`: either, `!a`: without
    reach: Reach = Reach()
    memory_mb: Positive | None = None  # what a file may take there at most: a bound of every budget there
    fingerprint: str = ""  # short hash of the one device that it was made for; empty: any that fits
    as_is: bool = False  # another device than that one is measured on, too; stands in readings and manifests
    measured: dict[str, float | str] = {}  # what `device add` found there; nothing here is ever assumed
    template: bool = False  # written from the maker's documentation, not yet measured by us


class Budget(Record):
    """Hard bounds on one device. `speedup` is against the uncompressed ONNX file on the same device."""

    profile: str
    latency_ms: Positive | None = None  # median; the mean over real inputs where the file decides by its input
    p50_ms: Positive | None = None
    p95_ms: Positive | None = None
    p99_ms: Positive | None = None
    worst_ms: Positive | None = None  # of the inputs of a file that decides
    speedup: Positive | None = None
    throughput: Positive | None = None  # samples per second, at the profile's batch
    size_mb: Positive | None = None
    memory_mb: Positive | None = None  # peak of a process that runs the file
    as_is: bool = False  # of a device that is not the one its profile was made for, too

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """`latency_ms: {mean: 0.4, p99: 1.0}` is `latency_ms: 0.4` and `p99_ms: 1.0`."""
        if not isinstance(data, dict):
            return data
        stated = cast("dict[str, Any]", data)
        asked: Any = stated.get("latency_ms")
        if not isinstance(asked, dict):
            return stated
        named = {"mean": "latency_ms", "p50": "p50_ms", "p95": "p95_ms", "p99": "p99_ms", "worst": "worst_ms"}
        bounds = cast("dict[str, Any]", asked)
        if unknown := [key for key in bounds if key not in named]:
            raise ValueError(f"latency_ms: unknown {unknown[0]!r}; it names {', '.join(named)}")
        rest = {key: value for key, value in stated.items() if key != "latency_ms"}
        return rest | {named[key]: value for key, value in bounds.items()}


class Goal(Record):
    """One device, or `all-devices`, with its budgets: it has its own violation, front and winner."""

    name: str
    budgets: tuple[Budget, ...]


class Limit(Record):
    """What quality must hold: a floor in the metric's own unit, higher is better."""

    metric: str
    floor: float


# --- what is measured: reading, quality, outcome ----------------------------------------------------------------


class Interval(Record):
    """A point estimate with a two-sided 95 % confidence interval."""

    value: float
    low: float
    high: float


class Runs(Record):
    """Milliseconds of single runs of a file and of the baseline; blocks of the same place were taken side by side."""

    model: tuple[tuple[float, ...], ...]
    baseline: tuple[tuple[float, ...], ...]
    inputs: int = 0  # real ones, of which every block of the model has one run each; 0: one stand-in


class Reading(Record):
    """Latency of one file on one device, interleaved with the baseline; refused when noisy (`noisy` set)."""

    profile: str
    ms: Interval  # median; the mean over `inputs` where the file decides by its input
    p95_ms: Interval  # of single runs; its interval is found by drawing blocks anew
    p99_ms: Interval | None = None
    p50_ms: Interval | None = None  # of single runs, where the file decides by its input
    worst_ms: float | None = None  # of its inputs
    inputs: int = 0  # samples of the task that it was timed with, in turn; 0: one stand-in
    baseline_ms: Interval  # the uncompressed file, in the same window
    ratio: Interval  # candidate / baseline; what is compared and promised
    samples: int
    rounds: int
    noisy: bool = False
    quiet: bool = False  # taken in a quiet phase (trainers paused)
    cores: tuple[int, ...] = ()
    fingerprint: str = ""  # short hash of the device's fingerprint
    as_is: bool = False  # that device is not the one that the profile was made for
    seconds: float = 0.0  # station time spent
    batch: int = 1  # samples in one run
    load_ms: float = 0.0
    memory_mb: float | None = None  # peak of a process that loads and runs the file, beyond what it needs without
    energy_mj: float | None = None  # of the processor package per run, where the target tells it
    drift: float = 0.0  # change of the baseline from the window's first third to its last, as a share
    slowed: float = 0.0  # how much slower the baseline was than at its fastest on this device, as a share
    # What a session's reading was made of. Not in its JSON: an artifact keeps them apart, compressed.
    runs: Runs | None = Field(default=None, exclude=True, repr=False)

    @property
    def speedup(self) -> float:
        """Baseline over candidate."""
        return 1.0 / self.ratio.value

    @property
    def throughput(self) -> Interval:
        """Samples per second at the profile's batch, from the median run."""
        low, value, high = (1e3 * self.batch / ms for ms in (self.ms.high, self.ms.value, self.ms.low))
        return Interval(value=value, low=low, high=high)


class Quality(Record):
    """Quality of an ONNX file on one split."""

    metric: str
    split: str
    value: Interval
    samples: int


class Point(Record):
    """One setting of a file's exits."""

    thresholds: dict[str, float]  # by exit; 0 always leaves, above 1 never
    shipped: bool = False  # the file's own
    quality: Quality  # on the selection split
    shares: dict[str, float]  # of the samples that leave by each exit, on the split that thresholds were tuned on
    readings: dict[str, Reading]  # per profile


class Stage(Record):
    """Quality of a network after one stage of its making."""

    name: str  # inherited, an op's name, batch norm, trained, shipped
    quality: Quality


class State(StrEnum):
    """Where a trial stands. `running` and `rung` are open; the others are ends of an attempt."""

    RUNNING = "running"
    RUNG = "rung"
    DONE = "done"
    INFEASIBLE = "infeasible"  # over every budget by measured latency; no training was spent
    STOPPED = "stopped"  # not promoted past its rung; may be promoted later, from its checkpoint
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True for the ends of an attempt."""
        return self not in (State.RUNNING, State.RUNG)


class Outcome(Record):
    """What one evaluation found. Readings and quality are keyed by profile name."""

    fidelity: Share = 0.0
    readings: dict[str, Reading] = {}
    quality: dict[str, Quality] = {}
    size_mb: dict[str, float] = {}  # file size per profile, 1 MB = 1e6 bytes
    macs: int = 0
    parameters: int = 0
    amounts: dict[str, dict[str, float]] = {}  # per profile: what its kernels take alone, by operation
    seconds: dict[str, float] = {}  # where the time went, by stage
    reason: str = ""  # why it failed or was infeasible, one line
    notes: tuple[str, ...] = ()  # e.g. "lowrank stages.0.0.conv1: skipped, factors cost more than the layer"
    files: dict[str, str] = {}  # role -> sha256 in the store (checkpoint, model:<variant>, receipts ...)


class Proposal(Record):
    """A searcher's answer to an ask; `note` comes back in the trial."""

    genotype: Genotype
    note: dict[str, Any] = {}


class Trial(Record):
    """One numbered evaluation. Number 0 is the control: the uncompressed parent."""

    number: int
    genotype: Genotype
    state: State
    attempt: int = 1
    rung: int = -1  # last rung reached, -1 before the first
    outcome: Outcome = Outcome()
    note: dict[str, Any] = {}


class LatencyModel(Record):
    """Ratio to the baseline by kernels, and the factor by which the truth lies beside it in 95 of 100 cases."""

    units: dict[str, float]  # of what an operation's kernels take alone, and of one kernel
    usual: float  # of what any other operation's take
    always: float  # what every run takes
    factor: float

    def ratio(self, amounts: Mapping[str, float]) -> float:
        """Predicted."""
        return self.always + sum(self.units.get(kind, self.usual) * amount for kind, amount in amounts.items())

    def at_least(self, amounts: Mapping[str, float]) -> float | None:
        """The lower end of the interval; None for a file whose kernels are not known."""
        return self.ratio(amounts) / self.factor if amounts else None


class Screen(Record):
    """What a file must be predicted to be slower than, to be left unmeasured on one device."""

    model: LatencyModel
    most: float  # ratio above which the device's budget cannot hold


class Assignment(Record):
    """What a worker is asked to do: evaluate a candidate, from a checkpoint where one is named."""

    number: int
    attempt: int
    genotype: Genotype
    candidate: Candidate
    rungs: tuple[Share, ...]  # fidelities to pass through, ascending, the last is the full training
    start: int = 0  # index of the first rung to train; earlier ones are in the checkpoint
    checkpoint: str | None = None  # sha256 in the store
    seed: int = 0
    screen: dict[str, Screen] = {}  # by profile; empty: everything is measured
    cycles: tuple[Share, ...] = ()  # where the learning rate begins anew; empty: at every rung
    peaks: tuple[Share, ...] = ()  # of the recipe's rate, the highest in each cycle; empty: all of it
    final: bool = False  # its end may be followed by more: the training's state is kept


# --- facts: what is known before the search -----------------------------------------------------------------------


class Site(Record):
    """A place in the unmodified network that a policy can speak of. `ops` names the ops that can act there."""

    name: str
    kind: str  # "conv", "linear", "depthwise" ...
    ops: tuple[str, ...] = ()
    when: dict[str, tuple[Choice, ...]] = {}  # arch choices under which the site exists at all
    parameters: int = 0
    macs: int = 0
    in_channels: int = 0
    out_channels: int = 0
    kernel: int = 1
    depth: Share = 0.0  # position from input (0) to output (1)
    choices: dict[str, tuple[Choice, ...]] = {}  # per op: what its first parameter may be here, where that depends


class Probed(Record):
    """One choice of a gene, tried without training before the search.

    Alone in the unmodified network, and (`best`) alone on top of the others' best choices: divergence of the outputs
    from the parent's, milliseconds gained by profile. None and empty where it was not tried.
    """

    gene: str
    choice: Choice
    kl: float | None = None  # nats per sample; half the squared difference in standard deviations for regression
    ms: dict[str, float] = {}
    best_kl: float | None = None  # what it adds to the divergence
    best_ms: dict[str, float] = {}
    smaller: float | None = None  # share of the file's size that it saves
    best_smaller: float | None = None  # the same among integers, of what saves nothing elsewhere
    reach: tuple[str, ...] = ()  # layers that it changes outside of the gene's own site
    kept: bool = True
    why: str = ""  # it left the space, or was not tried, one line


class Shared(Record):
    """An elastic parent, whose weights other structures than the parent's begin with."""

    weights: str  # sha256
    structures: int  # that shared them in training
    steps: int
    agreement: float | None = None  # rank correlation of untrained slices with trained candidates; None: not looked at
    decides: bool = False  # slices are a rung of their own: they decide who is trained


class Facts(Record):
    """Frozen inputs of a search, kept in the journal's header."""

    sites: tuple[Site, ...] = ()
    baseline: dict[str, Reading] = {}
    baseline_quality: Quality | None = None
    baseline_size_mb: float = 0.0
    parent: str = ""  # sha256 of the parent's weights
    bf16: bool | None = None  # whether a training step in bfloat16 was faster here; None: not tried
    fingerprints: dict[str, dict[str, Any]] = {}  # device fingerprints by their short hash
    versions: dict[str, str] = {}
    warm: tuple[Trial, ...] = ()  # of earlier runs, in the words of this space; notes say whose
    probe: tuple[Probed, ...] = ()  # of a derived space, before the choices that never pay left it
    integers: dict[str, float] = {}  # with every site in integers, latency as a share of the baseline's, by profile
    shared: Shared | None = None


# --- receipts -------------------------------------------------------------------------------------------------------


class Entry(Record):
    """What an op decided for one site."""

    site: str
    status: Literal["done", "skipped", "open"] = "done"  # open: training settles it, after which it is done
    why: str = ""  # for `skipped`: one line
    asked: dict[str, Choice] = {}
    achieved: dict[str, float] = {}
    facts: dict[str, Any] = {}  # JSON only: indices kept, rank, ranges ...


class Receipt(Record):
    """What exactly one op decided, in order of application. Facts alone rebuild every shape."""

    op: str
    version: int = 1
    entries: tuple[Entry, ...] = ()


# --- the job --------------------------------------------------------------------------------------------------------


class ModelSource(Record):
    """The parent: a builder's name (or `module:attr`, `torchvision:NAME` ...), its options, and trained weights.

    Without `weights` it is trained for `epochs` first; `epochs: 0` takes the weights that the builder itself gives it.
    """

    builder: str
    options: dict[str, Any] = {}  # keyword arguments of the function that makes the network
    weights: str | None = None
    epochs: float = Field(default=8.0, ge=0, allow_inf_nan=False)


class QualityLimit(Record):
    """`max_drop` below the baseline on the selection split, or an absolute `min`; exactly one of the two."""

    metric: str = "accuracy"
    max_drop: Share | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _one(self) -> QualityLimit:
        if (self.max_drop is None) == (self.min is None):
            raise ValueError("give exactly one of `max_drop` and `min`")
        return self


class Cost(Record):
    """What the search may spend; it ends at whichever comes first."""

    trials: int = Field(default=100, ge=1)
    minutes: Positive = 60.0
    # Share of the minutes kept for the last rung, to which the best few alone are trained, as far as the time reaches.
    final: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)

    @property
    def search_seconds(self) -> float:
        """After which nothing new is tried."""
        return self.minutes * 60 * (1 - self.final)


class Fidelity(Record):
    """Rungs of training. `full_epochs` is what fidelity 1 means; `rungs` are fidelities, ascending, ending in 1.

    At a rung of 0 a candidate is judged as it is cut, before any training.
    """

    full_epochs: Positive = 10.0
    rungs: tuple[Share, ...] = (0.3, 1.0)
    keep: Share = 0.5  # share of trials at a rung that go on

    @model_validator(mode="after")
    def _ascending(self) -> Fidelity:
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[-1] != 1.0:
            raise ValueError("`rungs` must ascend and end in 1.0, e.g. [0.3, 1.0]")
        return self


class SearchPlan(Record):
    """Which searcher, and how much it may spend."""

    searcher: str = "evolution"
    options: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0, lt=2**32)  # what numpy, torch and Optuna all take
    fidelity: Fidelity = Fidelity()
    cost: Cost = Cost()
    workers: int | None = Field(default=None, ge=1)
    patience: float = Field(default=30.0, ge=0, allow_inf_nan=False)  # minutes to wait for devices that are away
    sessions: int = Field(default=5, ge=1, le=100)  # fresh timing processes per device and finalist
    screen: bool = False  # leave unmeasured what is predicted to be far over every budget; by default all is measured
    probe: float = Field(default=60.0, ge=0, allow_inf_nan=False)  # seconds at most, for `space: auto` alone; 0: none
    warm: tuple[str, ...] = ()  # folders or journals of earlier runs whose trials it begins with
    elastic: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # minutes for an elastic parent; 0: none
    routes: bool = False  # `space: auto` offers exits and gates too; such files take one sample at a time
    ops: tuple[str, ...] = ()  # of `space: auto` these alone, `arch` for the builder's knobs; none: all of them

    @model_validator(mode="after")
    def _something_before_the_last(self) -> SearchPlan:
        if self.cost.final > 0 and len(self.fidelity.rungs) < 2:
            raise ValueError("`cost.final` keeps the last rung for the best few: `fidelity.rungs` needs one before it")
        return self


class Job(Record):
    """A whole search, as `examples/digits.yaml` writes it."""

    task: str
    data: dict[str, Any] = {}  # keyword arguments of the task: where its data lie, how they are read
    model: ModelSource
    space: str  # a name on the shelf, a file, or `auto`: derived from the network
    devices: tuple[Budget, ...] = Field(min_length=1)
    quality: QualityLimit = QualityLimit(max_drop=0.01)
    search: SearchPlan = SearchPlan()
    out: str

    @model_validator(mode="after")
    def _devices_differ(self) -> Job:
        names = [budget.profile for budget in self.devices]
        if len(set(names)) != len(names):
            raise ValueError("`devices` names a profile twice")
        return self


Arch = Mapping[str, Choice]


class UserError(Exception):
    """The person at the keyboard can mend this: one line saying what is wrong, where, and what to do (exit code 2)."""


class LimitError(Exception):
    """A stated limit (quality, budget, parity) does not hold (exit code 1)."""


class TrialFailure(Exception):
    """A candidate cannot be evaluated: becomes a failed trial with this reason, and the search goes on."""
