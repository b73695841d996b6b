"""The sections of a run's config beside its model: one frozen dataclass each, every field with its unit, meaning and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from teratron.config.errors import UserError
from teratron.config.groups import parse_group
from teratron.config.keys import Section, above, at_least, between, key
from teratron.config.lengths import parse_length


@dataclass(frozen=True)
class DataConfig(Section):
    """What is learned from, and in which order."""

    section: ClassVar[str] = "data"

    text: tuple[str, ...] = key(())
    """Raw files or folders, prepared on the way into the run directory (.txt, source code, .jsonl, .jsonl.gz, .jsonl.zst, .parquet)."""
    text_key: str = key("text")
    """The field of a .jsonl record or the column of a .parquet file that holds the text."""
    examples: str = key("")
    """A folder of examples that `teratron finetune` has made: train.safetensors, valid.safetensors and their tokenizer."""
    train: tuple[str, ...] = key(())
    """Prepared data sets (PREFIX of PREFIX.bin and PREFIX.idx); several, or `weight prefix weight prefix ...`, are blended."""
    valid: tuple[str, ...] = key(())
    """Prepared data sets for evaluation, as data.train; empty = the second part of data.split."""
    split: str = key("99,1")
    """Shares of training and validation when data.valid is empty: native order cuts the token stream, megatron order the documents."""
    tokenizer: str = key("")
    """A tokenizer file or folder, `bytes`, `chars`, `bpe:SIZE` or `wordpiece:SIZE` (trained on data.text).

    Empty = the data set's own, or bpe of model.vocab_size (8192 where that is 0)."""
    order: Literal["native", "megatron"] = key("native")
    """Sample order: a keyed permutation computed at any step, or Megatron-LM's GPTDataset order exactly."""
    isolate_documents: bool = key(False)
    """Attention and positions restart at each document."""
    mask_end_of_document: bool = key(False)
    """No loss where the input is the end-of-document token."""
    workers: int = key(0, at_least(0))
    """Processes that prepare data.text; 0 = one a CPU core."""

    def check(self) -> None:
        if self.text and self.train:
            raise UserError("data.text and data.train are both set: give raw text or prepared data sets, not both")
        if self.examples and (self.text or self.train or self.valid):
            raise UserError("data.examples holds everything a fine-tuning learns from: leave data.text, data.train and data.valid out")
        if self.valid and self.text:
            raise UserError(
                "data.valid needs data.train: prepare both with `teratron data prepare`, or leave data.valid out and use data.split"
            )


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """What is learned."""

    section: ClassVar[str] = "objective"

    name: Literal[
        "next_token", "masked", "permuted", "span_corruption", "denoising", "prefix", "ul2",
        "supervised", "classes", "pooled", "pointing", "similar", "preferred",
    ] = key("next_token")  # fmt: skip
    """next_token = predict each token from those before it (gpt, xlnet); masked = predict hidden tokens from both sides (encoder);
    permuted = predict tokens in a random order, each from the given ones and those before it in that order (xlnet).

    span_corruption = write the spans that a text lacks (T5); denoising = write a text that was corrupted (BART); prefix = go on with a
    text whose beginning is seen from both sides; ul2 = a mixture of denoisers. A gpt reads and writes one sequence.

    From data.examples: supervised = answers; classes = the class of a text or of its words; pooled = that of a text by the mean of its
    tokens; pointing = where an answer lies, or which choice is right; similar = vectors of pairs, alike; preferred = the better of two
    answers (DPO)."""
    label_smoothing: float = key(0.0, between(0, 1))
    """Share of the target's probability that is spread over the whole vocabulary in training (evaluation never smooths)."""
    contrastive: float = key(0.0, at_least(0))
    """Weight of a term that keeps the final states of a document's tokens apart (SimCTG, whose weight is 1); 0 = none, as in evaluation."""
    margin: float = key(0.5, at_least(0))
    """How far below 1 the contrastive term wants the cosine of two tokens' states."""
    ahead_weight: float = key(1.0, above(0))
    """Weight of the loss of each token after the next (model.predict_tokens)."""
    mask_rate: float = key(0.15, above(0), between(0, 1))
    """Share of a sample's tokens that masked hides, of which 80 % become the mask token, 10 % another token, 10 % stay; or that permuted
    predicts (XLNet: 1 / 6)."""
    whole_words: bool = key(True)
    """Hide whole words, not single pieces of them."""
    max_ngram: int = key(1, at_least(1))
    """Hide runs of up to so many words."""
    ngram: Literal["inverse", "geometric"] = key("inverse")
    """How likely a run of n words is: as 1 / n (ALBERT, Megatron-LM), or as 0.8^n (SpanBERT)."""
    sentence: Literal["none", "next", "order"] = key("none")
    """What masked learns beside: nothing, whether the second of two segments follows the first (BERT), or their order (ALBERT)."""

    noise_density: float = key(0.15, above(0), between(0, 1))
    """Share of the tokens that span_corruption and denoising take away (BART: 0.3)."""
    mean_span: float = key(3.0, at_least(1))
    """Mean length of the spans that they take away, in tokens."""
    corruption: Literal["infilling", "masking", "deletion"] = key("infilling")
    """How denoising corrupts: each span becomes one mask, each token becomes a mask, or tokens are deleted."""
    permute_sentences: bool = key(False)
    """Denoising also puts the sentences of a sample in another order."""
    temperature: float = key(0.05, above(0))
    """What similar divides cosines by."""
    beta: float = key(0.1, above(0))
    """How strongly preferred holds to the model that it began with."""

    def most_predicted(self, tokens: int) -> int:
        """How many of so many tokens masked or permuted predicts at most."""
        return max(1, math.ceil(self.mask_rate * tokens))

    def check(self) -> None:
        if self.sentence != "none" and self.name != "masked":
            raise UserError(
                f"objective.sentence = {self.sentence} goes with objective.name = masked, not {self.name}: change one, or leave it out"
            )


@dataclass(frozen=True)
class ParallelConfig(Section):
    """How a model and its batch are cut over the processes; nothing here changes the numbers."""

    section: ClassVar[str] = "parallel"

    tensor: int = key(1, at_least(1))
    """Ranks over which each layer's matrices are cut (heads, feed-forward features, vocabulary)."""
    sequence: bool = key(False)
    """Cut norms, dropout and the residual stream along the sequence over the tensor ranks: less memory for the same communication."""
    pipeline: int = key(1, at_least(1))
    """Ranks over which the layers are cut into stages, each micro-batch passing from one to the next."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv", "dualpipev"] = key("1f1b")
    """Order of a pipeline's forward and backward passes; the zb- ones and dualpipev put off weight gradients to fill the bubble."""
    chunks: int = key(0, at_least(0))
    """Stages that each pipeline rank holds; 0 = as few as the schedule needs (1; 2 for interleaved, zbv and dualpipev)."""
    split: str = key("")
    """Layers of each stage, such as 3,4,4,1; empty = even, the output layer counted as its work."""
    context: int = key(1, at_least(1))
    """Ranks over which each sample's tokens are cut, for long sequences."""
    context_method: Literal["ring", "all_to_all"] = key("ring")
    """How attention reaches over context ranks: keys and values travel round, or heads are exchanged for tokens."""
    expert: int = key(1, at_least(1))
    """Ranks over which the experts of a layer are cut: at the same time data, context or (with parallel.sequence) tensor ranks."""
    shard: Literal["none", "optimizer", "gradients", "parameters"] = key("none")
    """What the data ranks hold only a share of: nothing, optimizer state, also gradients, also parameters (ZeRO 1, 2, 3)."""
    replicate: int = key(0, at_least(0))
    """Copies of the sharded state, such as one a node; 0 = one where parallel.shard is set, else as many as there are data ranks."""
    reduce: Literal["fp32", "bf16"] = key("fp32")
    """Numbers in which gradients of half types are summed over the data ranks; fp32 and fp64 gradients are never rounded."""
    offload: Literal["none", "cpu", "disk"] = key("none")
    """Where master weights and the optimizer's state lie between updates: on the device, in host memory beside a GPU, or in files."""
    offload_activations: Literal["none", "cpu", "disk"] = key("none")
    """Where what blocks keep for the backward pass lies until then; with train.recompute = full that is only what goes into them."""
    offload_folder: str = key("")
    """Folder on a fast local disk for files of what is kept on disk; empty = the run's own."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """How weights change."""

    section: ClassVar[str] = "optim"

    name: Literal["adamw", "adam", "sgd", "lion", "lamb", "muon", "adafactor", "schedule_free"] = key("adamw")
    """Optimizer: adamw = Adam with decoupled weight decay; adam and sgd add the decay to the gradient (L2); lion, lamb, muon, adafactor.

    schedule_free = AdamW that averages the weights in place of a decay of the learning rate."""
    lr: float = key(3e-4, at_least(0))
    """Highest learning rate."""
    min_lr: float = key(0.0, at_least(0))
    """Learning rate at the end of the decay."""
    warmup_steps: int | str = key(0, at_least(0))
    """Steps over which the learning rate rises linearly from 0; or a share of the run such as 5%, or tokens such as `300M tokens`."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant", "range"] = key("cosine")
    """Shape after the warm-up; wsd = constant, then a decay over the last decay_steps.

    range = an exponential rise from min_lr to lr, to find a learning rate with."""
    decay_steps: int | str = key(0, at_least(0))
    """Step at which cosine and linear reach min_lr (0 = train.steps); for wsd the length of the last decay (0 = a fifth of train.steps).

    As optim.warmup_steps it may be a share of the run or tokens."""
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"] = key("linear")
    """How wsd decays over the share r of its last decay: 1 - r, (1 + cos(pi r)) / 2, 1 - sqrt(r), or 2^(1 - r) - 1 (Megatron-LM's)."""
    clock: Literal["steps", "tokens"] = key("steps")
    """What learning rate and weight decay go by; tokens = more slowly while batches are small."""
    weight_decay: float = key(0.1, at_least(0))
    """Weight decay, with adam and sgd as L2, else decoupled; biases and norms are never decayed."""
    weight_decay_ramp: Literal["none", "linear", "cosine"] = key("none")
    """Let the weight decay go from weight_decay_start to weight_decay over the whole run; groups with a decay of their own keep theirs."""
    weight_decay_start: float = key(0.0, at_least(0))
    """Weight decay at the beginning of a ramp."""
    groups: tuple[str, ...] = key(())
    """Parts that learn differently, by patterns of their names, such as `*.bias: lr=0.1 decay=0` or `embedding.*: frozen`.

    lr is a factor of the learning rate, decay takes the place of weight_decay; of lines that match the same part later ones win."""
    beta1: float = key(0.9, between(0, 1))
    """Decay rate of the first moment."""
    beta2: float = key(0.95, between(0, 1))
    """Decay rate of the second moment."""
    eps: float = key(1e-8, above(0))
    """Added to the root of the second moment."""
    moments: Literal["fp32", "bf16"] = key("fp32")
    """Numbers in which moments are kept: fp32 (those of the master weights), or bf16 with stochastic rounding."""
    masters: Literal["fp32", "bf16"] = key("fp32")
    """Numbers of the weights that are updated: fp32, or with train.precision bf16 the weights themselves, rounded stochastically."""
    momentum: float = key(0.95, between(0, 1))
    """Decay rate of the momentum of sgd and muon."""
    nesterov: bool = key(True)
    """Look ahead along the momentum of sgd and muon."""
    trust_min: float = key(0.0, at_least(0))
    """Norms of weights count as at least this in lamb's trust ratio."""
    trust_max: float = key(10.0, above(0))
    """Norms of weights count as at most this in lamb's trust ratio."""
    muon_scale: Literal["moonlight", "jordan"] = key("moonlight")
    """Factor of muon's learning rate: 0.2 * sqrt(longer side), which suits AdamW's rates, or sqrt(rows / columns), at least 1."""
    adam_lr: float = key(0.0, at_least(0))
    """Highest learning rate of what muon leaves to AdamW (embeddings, output projection, norms, biases); 0 = optim.lr."""
    clip: float = key(1.0, at_least(0))
    """Largest global gradient norm, or what optim.clip_by says; 0 = no clipping."""
    clip_by: Literal["norm", "value", "adaptive"] = key("norm")
    """What optim.clip bounds: the norm of all gradients together, each element, or each matrix's norm over that of its weights."""
    loss_scale: float = key(0.0, at_least(0))
    """Factor of the loss in fp16, which keeps small gradients from vanishing; 0 = adjusted on the way."""
    initial_loss_scale: float = key(2.0**32, at_least(1))
    """Where an adjusted loss scale begins; it is halved until gradients are finite."""
    min_loss_scale: float = key(1.0, above(0))
    """An adjusted loss scale never falls below this."""
    loss_scale_window: int = key(1000, at_least(1))
    """Steps without overflow after which an adjusted loss scale is doubled."""
    loss_scale_hysteresis: int = key(2, at_least(1))
    """Overflows, counted since the last doubling, after which an adjusted loss scale is halved at every further one."""

    def check(self) -> None:
        if self.min_lr > self.lr:
            raise UserError(f"optim.min_lr = {self.min_lr} exceeds optim.lr = {self.lr}: lower it")
        if self.schedule == "range" and (not self.min_lr or self.warmup_steps):
            raise UserError(
                f"optim.schedule = range rises from optim.min_lr = {self.min_lr} without a warm-up (optim.warmup_steps = "
                f"{self.warmup_steps}): set optim.min_lr above 0 and optim.warmup_steps to 0"
            )
        for name in ("warmup_steps", "decay_steps"):
            parse_length(getattr(self, name), f"optim.{name}")
        if self.decay_shape != "linear" and self.schedule != "wsd":
            raise UserError(
                f"optim.decay_shape = {self.decay_shape} is how wsd decays, but optim.schedule = {self.schedule}: add "
                "--optim.schedule wsd, or leave optim.decay_shape out"
            )
        if self.weight_decay_start and self.weight_decay_ramp == "none":
            raise UserError(
                f"optim.weight_decay_start = {self.weight_decay_start} with optim.weight_decay_ramp = none changes nothing: set "
                "--optim.weight_decay_ramp linear or cosine, or leave it out"
            )
        for text in self.groups:
            parse_group(text)
        if self.name == "schedule_free":
            self._check_schedule_free()
        if self.trust_min > self.trust_max:
            raise UserError(f"optim.trust_min = {self.trust_min} exceeds optim.trust_max = {self.trust_max}: lower it")
        if self.min_loss_scale > self.initial_loss_scale:
            raise UserError(
                f"optim.min_loss_scale = {self.min_loss_scale} exceeds optim.initial_loss_scale = {self.initial_loss_scale}: lower it"
            )

    def _check_schedule_free(self) -> None:
        if self.schedule != "constant":
            raise UserError(
                f"optim.name = schedule_free averages weights in place of a decay, optim.schedule = {self.schedule}: "
                "set --optim.schedule constant"
            )
        if not isinstance(self.warmup_steps, int):
            raise UserError(f"optim.name = schedule_free warms up over steps, optim.warmup_steps = {self.warmup_steps}: give a number")
        if self.clock != "steps":
            raise UserError(f"optim.name = schedule_free warms up over steps, optim.clock = {self.clock}: leave optim.clock out")
        if self.masters == "bf16":
            raise UserError(
                "optim.name = schedule_free averages master weights, which optim.masters = bf16 does without: leave optim.masters out, "
                "or choose another optim.name"
            )


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long, how much at once, how precise."""

    section: ClassVar[str] = "train"

    steps: int = key(1000, at_least(1))
    """Optimizer steps of the whole run."""
    global_batch: int = key(32, at_least(1))
    """Sequences of one optimizer step, over all processes."""
    batch_tokens: int = key(0, at_least(0))
    """Tokens of one optimizer step, in place of train.global_batch; 0 = global_batch * seq_length."""
    batch_schedule: str = key("")
    """How the batch grows to its size: START INCREMENT LENGTH (Megatron-LM's ramp over LENGTH sequences), or STEP:SIZE, STEP:SIZE, ...

    In sequences, or with train.batch_tokens in tokens; empty = the same size always."""
    micro_batch: int = key(0, at_least(0))
    """Sequences of one forward and backward pass of a process; 0 = its whole share of the global batch."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp64"] = key("fp32")
    """Numbers of weights and activations: fp32; bf16 or (with loss scaling) fp16 with float32 master weights; fp64 for tests.

    fp8 = bf16, but for the matrix products of linear layers, whose operands are rounded to float8."""
    fp8_scaling: Literal["tensor", "row"] = key("tensor")
    """What shares a scale in fp8: a whole operand (gradients in e5m2), or each of its rows along the sum (everything in e4m3)."""
    fp8_except: tuple[str, ...] = key(())
    """Linear layers that stay in bf16: patterns of their names such as `*.attention.*`, and `first` and `last` for those blocks.

    Embeddings, the output projection, routers and routed experts always do."""
    init: str = key("")
    """A file of `teratron convert` whose weights the run begins with; empty = they are drawn."""
    seed: int = key(1234, at_least(0))
    """Every random number of the run follows from it."""
    stop_after: float = key(0.0, at_least(0))
    """Minutes after the start of training in which it saves and stops with exit code 75, so that a script starts it again; 0 = never."""
    eval_every: int = key(100, at_least(0))
    """Steps between evaluations; 0 = only after the last step."""
    patience: int = key(0, at_least(0))
    """Evaluations without a better one after which the run ends; the best one's checkpoint is kept; 0 = never.

    Better is a higher accuracy where the objective has one, else a lower held-out loss."""
    eval_batches: int = key(0, at_least(0))
    """Global batches of one evaluation; 0 = the whole validation data."""
    eval_tasks: tuple[str, ...] = key(())
    """Tasks of `teratron eval` that are measured while the run learns, as TASK:FILE such as `choice:arc_easy.jsonl`."""
    eval_tasks_every: int = key(0, at_least(0))
    """Steps between these measurements; 0 = only after the last step."""
    eval_tasks_limit: int = key(200, at_least(0))
    """Examples of each file that are measured, the first ones; 0 = all."""
    recompute: Literal["none", "selective", "full"] = key("none")
    """Activations made again in the backward pass instead of kept: none, those inside attention, or whole blocks."""
    recompute_every: int = key(1, at_least(1))
    """Recompute only in every so many-th block."""
    memory_budget: float = key(0.0, at_least(0))
    """GiB that a step may take on a device: as few activations are made again (train.recompute) as that leaves; 0 = no budget."""
    compile: bool = key(False)
    """Compile each block with torch.compile (needs a C++ compiler on CPU)."""
    deterministic: bool = key(False)
    """On CUDA use only deterministic kernels, so that a resumed run is bit-identical (slower; CPU always is)."""
    on_bad_numbers: Literal["halt", "skip"] = key("halt")
    """When loss or gradients are NaN or infinite: stop and name the module, or skip the update (at most 10 in a row)."""
    spike_zscore: float = key(0.0, at_least(0))
    """A loss so many deviations above the median of the last ones goes back to a checkpoint and leaves batches out; 0 = never."""
    spike_window: int = key(100, at_least(8))
    """Losses that train.spike_zscore compares with; there is no spike before there are so many."""
    spike_skip: int = key(2, at_least(1))
    """Batches left out after a spike: that of the spike itself and those before it."""
    verify_every: int = key(0, at_least(0))
    """Steps between searches for silently corrupted numbers: weights compared over their copies, or a step computed twice; 0 = never."""

    def check(self) -> None:
        if self.memory_budget and self.recompute != "none":
            raise UserError(
                f"train.memory_budget = {self.memory_budget:g} chooses train.recompute, here {self.recompute}: leave one of them out"
            )
        if self.recompute == "none" and self.recompute_every > 1:
            raise UserError(
                f"train.recompute_every = {self.recompute_every} with train.recompute = none, which makes nothing again: "
                "set --train.recompute full or selective, or leave train.recompute_every out"
            )
        for item in self.eval_tasks:
            if not all(item.partition(":")):
                raise UserError(f"train.eval_tasks = {item}: expected TASK:FILE, such as choice:arc_easy.jsonl")
        if self.patience and not self.eval_every:
            raise UserError(f"train.patience = {self.patience} counts evaluations, train.eval_every = 0 makes none: set train.eval_every")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """What is kept of a run."""

    section: ClassVar[str] = "checkpoint"

    every: int | Literal["auto"] = key(500, at_least(0))
    """Steps between checkpoints; 0 = only after the last step and on interrupt; auto = from what a save costs and failures_per_day."""
    failures_per_day: float = key(1.0, above(0))
    """Unexpected stops that `checkpoint.every = auto` reckons with."""
    keep: int = key(2, at_least(0))
    """Newest checkpoints kept on disk; 0 = all."""
    keep_every: int = key(0, at_least(0))
    """Every so many steps a checkpoint is made that is never removed; 0 = none."""
    asynchronous: bool = key(True)
    """Write checkpoints while training goes on, from a copy of the state in host memory."""
    copy_to: str = key("")
    """Folder, or URL such as s3://bucket/path, in which each checkpoint is copied into a folder of the run's name; empty = none."""
    memory_every: int = key(0, at_least(0))
    """Steps between checkpoints in the machine's memory (/dev/shm), from which killed processes go on; 0 = none."""


@dataclass(frozen=True)
class LogConfig(Section):
    """What a run tells."""

    section: ClassVar[str] = "log"

    every: int = key(10, at_least(1))
    """Steps between lines on a screen that is no terminal, and between all ranks' times and memory in metrics.jsonl (it has every step)."""
    tensorboard: bool = key(True)
    """Write TensorBoard files into RUN/tensorboard when the tensorboard package is installed."""
    wandb: str = key("")
    """Project of Weights & Biases that the curves are sent to as well (needs the wandb package); empty = none."""
    mlflow: str = key("")
    """Experiment of MLflow that the curves are sent to as well (needs the mlflow package); empty = none."""
    profile_step: int = key(0, at_least(0))
    """Step that is traced by PyTorch's profiler into RUN/profile; 0 = none, until a file RUN/profile-now asks for one."""
    noise_scale: int = key(0, at_least(0))
    """Steps between measurements of the gradient noise scale, each of which costs a quarter of a step; 0 = never."""
    norms: int = key(0, at_least(0))
    """Steps between events with every part's gradient norm, weight norm and relative update; 0 = never."""
