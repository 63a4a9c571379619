"""Every setting of a run: typed, documented, strict.

A run is one YAML file plus ``a.b=value`` overrides (:mod:`uniopd_mm.settings` reads them).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from uniopd_mm.settings import Settings

Stage = Literal["vision", "projector", "language"]


class LoraConfig(Settings):
    rank: int = Field(default=16, gt=0)
    """Rank of the adapter matrices."""
    alpha: float = 32.0
    """Scale numerator; the update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter input; 0 keeps the sampler and the trainer the same function."""
    stages: list[Stage] = ["language"]
    """Stages whose linear layers get an adapter; the others stay frozen unless `student.freeze` leaves them out."""
    targets: list[str] | None = None
    """Names of the linear layers to adapt, e.g. [q_proj, v_proj]; null = every linear layer of the stages."""


class ModelConfig(Settings):
    model: str
    """Hugging Face folder or hub id."""
    revision: str | None = None
    """Hub revision; null = the default branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in memory."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto = flash_attention_2 where it is installed and there is a GPU, else sdpa.  With shared_prefix this is the vision
    tower's; the language model then uses PyTorch's own kernels (sdpa)."""
    min_pixels: int | None = None
    """Smallest image area in pixels after resizing, for families that resize freely; null = the processor's own."""
    max_pixels: int | None = None
    """Largest image area in pixels after resizing, for families that resize freely; null = the processor's own."""
    template: dict[str, Any] = {}
    """Extra variables of the chat template, e.g. {enable_thinking: false}."""
    shared_prefix: bool = True
    """Run a group's prompt once and its responses behind it (exact); false = one full row per rollout, to compare.
    Models with linear attention always run full rows."""
    vision_cache_mib: int = Field(default=1024, ge=0)
    """Memory for what a frozen vision tower made of the images it has seen, MiB; 0 = forgotten after each step."""


class StudentConfig(ModelConfig):
    freeze: list[Stage] = ["vision"]
    """Stages that are not trained."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the full weights (needs the `lora` extra)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


View = Literal["image", "text", "drop"]


class ServerConfig(Settings):
    kind: Literal["vllm", "vllm_text", "sglang", "openai"] = "vllm"
    """vllm = /inference/v1/generate of vLLM (start it with --enable-scale-out); sglang = /generate of SGLang; both take
    images.  For text alone: vllm_text = /v1/completions of vLLM; openai = /v1/completions with echo, of other servers."""
    urls: list[str] = Field(min_length=1)
    """Servers of the same model, e.g. ["http://node1:8000", "http://node2:8000"]; requests go to the least busy one."""
    model: str | None = None
    """Name under which the model is served; null = the only one that the servers have."""
    concurrency: int = Field(default=32, gt=0)
    """Requests under way at each URL, from each rank."""
    timeout_s: float = Field(default=300.0, gt=0)
    """A request that takes longer has failed, and is tried again."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after a failed one, on another URL where there is one."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; null = none is sent."""


class RolloutServerConfig(ServerConfig):
    sync: Literal["disk", "never"] = "disk"
    """How the servers get the student's weights: disk = through a folder that they can read too; vLLM needs
    VLLM_SERVER_DEV_MODE=1 for it.  never = they keep those they were started with, more and more stale."""
    sync_every: int = Field(default=1, gt=0)
    """Optimizer steps between two synchronisations."""
    sync_folder: str | None = None
    """Folder on a disk that trainer and servers share, for this run alone; null = sync/ in the run folder."""
    max_mismatch: float = Field(default=0.5, gt=0)
    """Mean |trainer - server| log-probability of one step's tokens, in nats, past which servers that were given weights
    are held to sample from others, and the run stops."""
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """Share of one step's rollouts that may fail to be sampled before the run stops; they are left out and counted."""

    @model_validator(mode="after")
    def _can_sync(self) -> RolloutServerConfig:
        if self.kind == "openai" and self.sync != "never":
            raise ValueError(
                "kind: openai has no way to load new weights; set sync: never, or use vllm or sglang"
            )
        return self


class TeacherConfig(ModelConfig):
    domains: list[str] | None = None
    """Domains this teacher scores; null = every domain no other teacher names (one such teacher at most)."""
    view: View | dict[str, View] | None = None
    """What it sees of an image: image (the picture), text (`image_text` of the row), drop (nothing); or one for each
    domain, e.g. {chart: image, math: text}.  null = image for a multimodal teacher, text for a text-only one."""
    in_modal_weight: float = Field(default=0.0, ge=0, le=1)
    """Where its view is text: share of the advantage that is measured against the student reading the same text instead
    of the student seeing the picture (X-OPD's in-modal part, arXiv 2603.24596); costs one more forward pass."""
    device: Literal["auto", "cpu", "swap"] = "auto"
    """auto = beside the student; cpu = lives and computes on the CPU; swap = rests in CPU memory and is moved beside the
    student while it scores."""
    allow_blind: bool = False
    """Needed with view: drop for prompts that have images; a blind teacher can wreck a student."""
    align: Literal["auto", "span", "exact"] = "auto"
    """Different vocabularies: span = spread a span's log-probability over its student tokens; exact = only spans of one
    student token; auto = ids when the vocabularies are equal, else span."""
    server: ServerConfig | None = None
    """Its weights are behind servers; `model` is then the folder or hub id of its tokenizer and processor, and `dtype`
    what the servers compute in.  null = loaded by every rank."""
    max_unscored_share: float = Field(default=0.5, ge=0, le=1)
    """Share of one step's rollouts that it may leave unscored (a failed server, nothing to align) before the run stops."""

    def view_of(self, domain: str) -> View | None:
        """Its view of the prompts of one domain; None = as the teacher can."""
        return self.view.get(domain) if isinstance(self.view, dict) else self.view


class SourceConfig(Settings):
    path: str
    """JSONL, JSON, Parquet, a `datasets` folder or a hub id."""
    name: str | None = None
    """Prefix of the sample ids; null = the file's stem."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a `datasets` source."""
    slice: str | None = None
    """Rows to take, e.g. "0:1000" or ":10%"; null = all."""
    weight: float = Field(default=1.0, ge=0)
    """Share of this source in an epoch relative to its size: 2 = each row twice, 0.5 = a random half."""
    domain: str | None = None
    """Domain of rows that carry none."""
    verifier: str | None = None
    """Verifier of rows that carry none."""
    columns: dict[str, str] = {}
    """Column renames, ours: theirs, e.g. {answer: label}."""
    prompt: str | None = None
    """Template of the user turn for rows without `messages`, e.g. "{question}\\nAnswer with one word."."""
    image_root: str | None = None
    """Folder that relative image paths start from; null = the data file's folder."""


class DataConfig(Settings):
    train: str | list[SourceConfig]
    """A mixture YAML, a data file, or a list of sources."""
    eval: str | list[SourceConfig] | None = None
    """Held-out data in the same forms; null = no evaluation."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be malformed and are skipped; past it the run stops with the list."""
    shuffle: bool = True
    """New seeded order in every epoch."""


class SamplingConfig(Settings):
    temperature: float = Field(default=1.0, ge=0)
    """0 = greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: smallest set of tokens that holds this probability; 1 = off."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 = off."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Keep tokens at least this likely relative to the likeliest; 0 = off."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """Longest response, in tokens."""
    stop_token_ids: list[int] = []
    """Stop tokens beside the model's own end-of-turn tokens."""


class EvalSamplingConfig(SamplingConfig):
    temperature: float = Field(default=0.0, ge=0)
    """0 = greedy."""


class RolloutConfig(SamplingConfig):
    prompts_per_step: int = Field(default=32, gt=0)
    """Prompts (= groups) of one optimizer step, over all ranks."""
    n: int = Field(default=8, gt=0)
    """Rollouts per prompt (group size)."""
    concurrent_rollouts: int = Field(default=256, gt=0)
    """Rollouts decoded together on one rank; bounds the memory of the KV cache."""
    server: RolloutServerConfig | None = None
    """Servers that sample instead of the training process; null = the local engine."""
    rescore: Literal["auto", "always", "never"] = "auto"
    """Score the student again with the trainer's own forward pass before the update; auto = where the sampler's
    log-probabilities are not the same numbers (bfloat16, temperature different from loss.score_temperature)."""


class JudgeConfig(Settings):
    url: str
    """OpenAI-compatible server of the judge, e.g. http://localhost:8000 (without /v1)."""
    model: str | None = None
    """Name under which the judge is served; null = the only one that the server has."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; null = none is sent."""
    concurrency: int = Field(default=16, gt=0)
    """Requests under way."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A request that takes longer has failed; an answer that cannot be judged is unknown."""
    retries: int = Field(default=2, ge=0)
    """Further attempts after a failed one."""


class SandboxConfig(Settings):
    allow_unsafe: bool = False
    """Run programs also where the machine offers less than process, network and file isolation (level 2)."""
    memory_mb: int = Field(default=1024, gt=0)
    """Address space of a program, MiB."""
    time_limit_s: float = Field(default=10.0, gt=0)
    """Longest time for one test, where the row names none."""
    total_limit_s: float = Field(default=60.0, gt=0)
    """Longest time for all tests of one program, where the row names none."""


class VerifierConfig(Settings):
    default: str = "math"
    """Verifier of rows and domains that name none; `name:profile` picks a scoring profile, e.g. chart:upstream."""
    by_domain: dict[str, str] = {}
    """Verifier of each domain, e.g. {chart: chart, doc: document}."""
    workers: int = Field(default=1, gt=0)
    """Worker processes per rank for verifiers that may hang (math)."""
    timeout_s: float = Field(default=3.0, gt=0)
    """A check that takes longer is killed and its outcome is unknown."""
    judge: JudgeConfig | None = None
    """Language model that judges what rules cannot; null = none, and verifier: judge is refused."""
    sandbox: SandboxConfig = SandboxConfig()
    """Where verifier: code runs programs."""
    max_unknown_share: float = Field(default=0.5, ge=0, le=1)
    """Share of outcomes in one step that may be unknown before the run stops."""


class BalanceConfig(Settings):
    ratio: float | None = Field(default=1.0, ge=0)
    """correct : incorrect kept in the update; 0 = only incorrect, .inf = only correct, null = off."""
    scope: Literal["group", "batch"] = "group"
    """Balance within each group or over the whole batch."""
    margin_before_balance: bool = True
    """Margins are measured on all rollouts, also those balanced out."""


class CalibrationConfig(Settings):
    kind: Literal["none", "shift", "mask", "outcome", "gc", "iw"] = "shift"
    """shift / mask: margin calibration; outcome: A + c (2R - 1), the control that is only an added reward;
    gc: GC-OPD, add what the verifier says beyond the teacher; iw: IW-OPD, weigh early tokens more."""
    margin: Literal["mean", "minmax"] = "mean"
    """mean = mean correct - mean incorrect return; minmax = worst correct - best incorrect."""
    scope: Literal["group", "global"] = "group"
    """Margins per prompt, or over the whole batch on all ranks."""
    direction: Literal["lift", "lower", "spread"] = "lift"
    """shift: raise correct rollouts, lower incorrect ones, or half of each."""
    delta: float = 0.0
    """Wanted margin, nats per token.  Presets of the paper: text students mean/group/spread/0.4, multimodal
    students mean/group/lift/0."""
    mask: Literal["greedy", "group"] = "greedy"
    """mask: drop single rollouts until the margin holds, or drop groups whose margin does not hold."""
    min_retain: float = Field(default=0.25, ge=0, le=1)
    """mask greedy: share of each class that is never dropped."""
    outcome_weight: float = 0.2
    """outcome: the constant c, nats per token."""
    residual_weight: float = 0.1
    """gc: weight beta of the difference between the scores of reward and return within the group."""
    advantage_clip: float = Field(default=10.0, gt=0)
    """gc: calibrated advantages are clipped to +- this, nats."""
    position_weight: float = Field(default=0.5, ge=0)
    """iw: the first token weighs 1 + this, later ones less and less, down to 1."""

    @model_validator(mode="after")
    def _group_mask_needs_groups(self) -> CalibrationConfig:
        if self.kind == "mask" and self.mask == "group" and self.scope == "global":
            raise ValueError("mask: group needs scope: group; with scope: global use mask: greedy")
        return self


class LossConfig(Settings):
    clip_low: float = Field(default=0.2, ge=0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """The ratio is clipped above at 1 + clip_high."""
    gap_mask: float | None = 10.0
    """A token whose student and teacher log-probabilities differ by this much or more (nats) has no loss; null = off."""
    aggregation: Literal["sample_mean", "token_mean"] = "sample_mean"
    """sample_mean = mean over a rollout's tokens, then over rollouts; token_mean = over all tokens of the batch."""
    renormalize: bool = False
    """Divide by the kept rollouts (or tokens) instead of all sampled ones."""
    score_temperature: float = Field(default=1.0, gt=0)
    """Temperature at which student and teacher are scored."""
    mismatch_cap: float | None = 2.0
    """Truncated importance weight for a sampler that is not the trainer's own forward pass; null = off."""


class OptimConfig(Settings):
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    stage_lr: dict[Stage, float] = {}
    """Learning rate of single stages, e.g. {projector: 1.0e-5}."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator offset."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm is clipped to this."""


class DistributedConfig(Settings):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 = plain data parallel, 1 = + sharded optimizer, 2 = + gradients, 3 = + weights."""
    micro_groups: int = Field(default=1, gt=0)
    """Groups (prompts with all their rollouts) in one forward/backward on one rank."""
    micro_tokens: int = Field(default=8192, gt=0)
    """Response tokens that run at once in scoring and in the update.  What is beyond runs in further chunks behind the
    same prompt; their activations are computed again in the backward pass: bounded memory, up to a third more time."""
    offload_optimizer: bool = False
    """Keep optimizer state in CPU memory."""
    deepspeed: dict[str, Any] = {}
    """Entries of the DeepSpeed configuration laid over ours, e.g. {zero_optimization: {overlap_comm: false}}."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """A collective that waits longer fails."""


class EvalConfig(Settings):
    every: int = Field(default=50, ge=0)
    """Evaluate every so many steps, and before and after training; 0 = never."""
    limit: int | None = None
    """Held-out rows to use; null = all."""
    n: int = Field(default=1, gt=0)
    """Answers per prompt; the score is their mean."""
    batch: int = Field(default=64, gt=0)
    """Prompts answered together on one rank."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    """How answers are sampled; greedy by default."""


class CheckpointConfig(Settings):
    every: int = Field(default=50, ge=0)
    """Save every so many steps, and at the end; 0 = only at the end."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""


class ReportConfig(Settings):
    rollouts_every: int = Field(default=10, ge=0)
    """Write rollouts/step_*.jsonl every so many steps; 0 = never."""
    rollouts_per_step: int = Field(default=16, gt=0)
    """Rollouts written per step."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Mirrors of metrics.jsonl; each must be installed."""


class TrainConfig(Settings):
    """One training run."""

    out: str
    """Run folder; the same command continues what it finds there."""
    seed: int = 0
    """Seeds data order, sampling and balancing; same seed, data and ranks give the same numbers."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    prepare: str | None = None
    """Command run once before anything is loaded (by the first rank of each node), e.g. to build models or data."""
    student: StudentConfig
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    score_cache: str | None = None
    """Folder that keeps what teachers scored, so that no teacher is asked for the same twice; null = nothing is kept."""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    balance: BalanceConfig = BalanceConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    distributed: DistributedConfig = DistributedConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _one_teacher_per_domain(self) -> TrainConfig:
        owners: dict[str, str] = {}
        defaults = [name for name, t in self.teachers.items() if t.domains is None]
        if len(defaults) > 1:
            raise ValueError(
                f"teachers {defaults} all lack `domains`; at most one teacher may be the default"
            )
        for name, teacher in self.teachers.items():
            for domain in teacher.domains or ():
                if domain in owners:
                    raise ValueError(
                        f"domain '{domain}' belongs to two teachers: {owners[domain]} and {name}"
                    )
                owners[domain] = name
        return self

    @model_validator(mode="after")
    def _servers_score_at_temperature_one(self) -> TrainConfig:
        remote = [name for name, t in self.teachers.items() if t.server is not None]
        if remote and self.loss.score_temperature != 1.0:
            raise ValueError(
                f"loss.score_temperature={self.loss.score_temperature}, but servers score prompts at temperature 1 "
                f"only (teachers with `server`: {', '.join(remote)}). Set loss.score_temperature=1"
            )
        return self
