"""From flags to a run that is ready to train: data, model, optimizer, steps, header."""

import argparse
import importlib.util
import math
import os
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tokenizers import Tokenizer
from torch.amp import GradScaler

import checkpoints
import gpu
import loralib as lora
from checkpoints import AdapterHeader, Base, BaseWeights, Vocabulary
from common import packed_attention
from common.errors import InputError
from common.text_files import check_shareable
from data_utils import EpochSampler, FT_Dataset, load_tokenizer
from gpu import Runtime
from methods import ADDITIONS, BOTTLENECKS, BottleneckConfig, PrefixConfig, train_added, train_only
from model import GPT2Config, GPT2LMModel
from optimizer import (
    RECIPE_WARMUP,
    OptimizerSettings,
    create_adam_optimizer_from_args,
    create_optimizer_scheduler,
    optimizer_class,
    rate_factor,
)
from training.flags import DEFAULT_EPOCHS, FULL_KEEPS, LARGEST_HIDDEN, RECIPE_LOG_INTERVAL
from training.graphs import Graphs
from training.log import RunLog
from training.report import (
    print_disk,
    print_published,
    print_scoring,
    print_sizes,
    saved_parameters,
    trained_parameters,
)
from training.resume import State, check_equal_ranks, check_settings, flat, restore
from training.run import Plan, Run, RunSettings, trained_tensors
from training.scores import FLAGS, Scoring, ValidTexts
from training.updates import CheckedUpdates, DeferredUpdates, defers

T = TypeVar("T")

# Flags that a rank may have to itself: the same files may have other paths on another machine.
OWN_OF_A_RANK = {
    "rank", "local_rank", "device", "work_dir", "train_data", "valid_data", "init_checkpoint",
    "vocab", "resume", "dist_timeout", "platform",
}  # fmt: skip

# Two runs that agree in these, in their data and in their base give the same adapter.
RESULT_SETTINGS = [
    "obj",
    "seq_len",
    "train_batch_size",
    "global_batch",
    "label_smooth",
    "clip",
    "max_step",
    "max_epoch",
    "lora_dim",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_kind",
    "use_rslora",
    "lora_plus_ratio",
    "train_bias",
    "train_top",
    "optimizer",
    "lr",
    "weight_decay",
    "correct_bias",
    "adam_epsilon",
    "adam_beta1",
    "adam_beta2",
    "no_decay_bias",
    "scheduler",
    "warmup_step",
    "i_steps",
    "i_lrs",
    "random_seed",
    "fp16",
    "bf16",
]


def prepare(args: argparse.Namespace, runtime: Runtime, work_dir: Path, state: State | None) -> Run:
    """Return the run that the flags describe, put back to `state` if there is one."""
    check_early(args, runtime)
    scoring = scoring_settings(args)
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    base = None if args.init_checkpoint == "none" else checkpoints.read_base(args.init_checkpoint)
    gpu.seed_everything(args.random_seed)
    model = build_model(args, base, tokenizer)
    train, valid = load_data(args, runtime, tokenizer, model.config)
    plan = plan_steps(args, runtime, len(train), state)
    fingerprint = base.fingerprint if base else checkpoints.base_fingerprint(model.state_dict())
    data = train.rows.source.sha256
    header = describe_adapter(args, plan, model, tokenizer, fingerprint, data)
    then = state and state.header.vocabulary
    if then and tokenizer is not None and then.is_of(tokenizer):
        header = replace(header, vocabulary=then)  # an older fingerprint of it stays as it was
    settings = run_settings(args, plan, work_dir)
    flags = resolved_flags(args, runtime, plan, settings, model) | scoring.flags()
    shared = {name: value for name, value in flags.items() if name not in OWN_OF_A_RANK}
    valid_data = valid.rows.source.sha256 if valid else None
    check_equal_ranks(runtime, shared | flat(header) | {"valid_data": valid_data})
    if state is not None and not args.resume_anyway:
        check_settings(state, header, scoring)
    send_to_device(args, runtime, model)
    for_optimizer = optimizer_settings(args, plan)
    deferred = defers(runtime, args.optimizer)
    optimizer = create_adam_optimizer_from_args(model, for_optimizer, deferred)
    scheduler = create_optimizer_scheduler(optimizer, for_optimizer)
    scaler = GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    checked = CheckedUpdates(optimizer, scheduler, scaler)
    # Equal models on all ranks, but dropout of their own.
    gpu.seed_everything(args.random_seed + runtime.rank)
    run = Run(
        runtime=runtime,
        settings=settings,
        plan=plan,
        flags=flags,
        model=runtime.wrap(model),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        updates=DeferredUpdates(optimizer, scheduler) if deferred else checked,
        graphs=graphs_of(args, runtime, model) if args.cuda_graphs else None,
        train=train,
        valid=valid,
        sampler=sampler_of(args, runtime, plan, len(train)),
        header=header,
        log=RunLog(work_dir),
        tokenizer=tokenizer,
        scoring=scoring,
        valid_texts=texts_to_score(scoring, valid, tokenizer, model.config),
    )
    if state is not None:
        source = work_dir if args.resume == "auto" else Path(args.resume)
        restore(run, state, source)
    return run


def send_to_device(args: argparse.Namespace, runtime: Runtime, model: GPT2LMModel) -> None:
    """Bring the model to where it is trained, in the form that it is trained in."""
    model.transformer.gradient_checkpointing = args.gradient_checkpointing
    if args.base_dtype:
        model.hold_base_in(gpu.AUTOCAST[args.base_dtype])
    model.to(runtime.device).train()
    if args.compile:
        model.transformer.compile_blocks()


def from_flags(kind: type[T], args: argparse.Namespace, **resolved: object) -> T:
    """Return an object of a dataclass whose fields have the names of flags; `resolved` rules."""
    names = {field.name for field in fields(cast(Any, kind))}
    return kind(**{name: getattr(args, name) for name in names - resolved.keys()}, **resolved)


def show_plan(args: argparse.Namespace, runtime: Runtime) -> None:
    """Print the sizes of the run that these flags start. Nothing is written, and no weights are
    read or made: of the base the shapes are enough."""
    check_early(args, runtime)
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    base = None if args.init_checkpoint == "none" else checkpoints.read_shapes(args.init_checkpoint)
    with torch.device("meta"):
        model = build_model(args, base, tokenizer)
    train, valid = load_data(args, runtime, tokenizer, model.config)
    texts = texts_to_score(scoring_settings(args), valid, tokenizer, model.config)
    plan = plan_steps(args, runtime, len(train), None)
    settings = run_settings(args, plan, Path(args.work_dir or "runs"))
    rate_factor(optimizer_settings(args, plan))
    if runtime.rank == 0:
        print_sizes(model, runtime, plan, len(train), args.work_dir)
        print_published(model, method_of(args))
        if texts:
            print_scoring(texts, plan, settings)
        print_disk(model, plan, settings, bool(args.valid_data))


def check_early(args: argparse.Namespace, runtime: Runtime) -> None:
    """Refuse what can be refused before any file is read.

    Raises:
        InputError: there is no such optimizer, schedule or compiler here, or the settings of the
            adapter or of the scores or the dtype of the base are wrong.
    """
    endless = Plan(1, 1, 1, args.max_step or sys.maxsize, None, args.warmup_step or 0)
    settings = optimizer_settings(args, endless)
    optimizer_class(settings, runtime.device.type == "cuda")
    rate_factor(settings)
    adapter_settings(args)
    scoring_settings(args)
    if args.compile:
        check_compiler(runtime.device)
    if args.cuda_graphs:
        check_recordable(args, runtime)
    if args.base_dtype:
        check_base_dtype(args, runtime)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where what torch.compile needs is not there."""
    if device.type == "mps":
        raise InputError("--compile is for CPUs and CUDA devices; leave it out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile needs triton, which is not installed; leave it out")
    language, variable, usual = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if device.type == "cuda":  # triton's own choice, for what launches its kernels
        language, variable, usual = "C", "CC", ["gcc", "clang"]
    compilers = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"--compile needs a {language} compiler, and there is no {' or '.join(compilers)}; "
            "leave it out"
        )


def check_recordable(args: argparse.Namespace, runtime: Runtime) -> None:
    """Refuse what a CUDA graph cannot record, as the host would have to know the lengths of texts,
    the random state, or the other processes meanwhile."""
    if runtime.device.type != "cuda":
        raise InputError("--cuda_graphs is for CUDA devices; leave it out")
    if runtime.precision == "fp32":
        raise InputError("--cuda_graphs goes with --bf16 or --fp16; give one, or leave it out")
    if runtime.world_size > 1:
        raise InputError(
            "--cuda_graphs is for one process; leave it out, or start without torchrun"
        )
    if args.gradient_checkpointing:
        raise InputError("--cuda_graphs and --gradient_checkpointing exclude each other; give one")
    if args.method == "prefix":
        raise InputError("--cuda_graphs cannot record --method prefix; leave it out")


def graphs_of(args: argparse.Namespace, runtime: Runtime, model: GPT2LMModel) -> Graphs:
    """Return what records the passes of this model.

    Raises:
        InputError: this GPU or PyTorch has no attention without padding.
    """
    row = torch.empty(0, dtype=gpu.AUTOCAST[runtime.precision], device=runtime.device)
    if not packed_attention.is_possible(row, model.config.n_embd // model.config.n_head):
        raise InputError(
            "--cuda_graphs needs attention without padding, which takes an Ampere or later GPU and "
            "PyTorch 2.10 or later; leave it out"
        )
    return Graphs(runtime, trained_tensors(model).values(), args.seq_len)


def check_base_dtype(args: argparse.Namespace, runtime: Runtime) -> None:
    """Refuse to round a base that is trained, or that is computed with in another precision."""
    if args.method not in ("lora", *ADDITIONS):
        raise InputError(
            f"--base_dtype {args.base_dtype} is for a frozen base, and --method {args.method} "
            "trains weights of the base; leave one of the two out"
        )
    if runtime.precision != args.base_dtype:
        raise InputError(
            f"--base_dtype {args.base_dtype} goes with --{args.base_dtype}, and this run computes "
            f"in {runtime.precision}; give both or neither"
        )


def run_settings(args: argparse.Namespace, plan: Plan, work_dir: Path) -> RunSettings:
    """Return what the loop obeys; the defaults of some flags follow from others."""
    keep_last, log_interval = args.keep_last, args.log_interval
    if keep_last is None:
        keep_last = FULL_KEEPS if method_of(args) == "full" else 0
    if log_interval is None:
        log_interval = min(RECIPE_LOG_INTERVAL, max(plan.max_step // 10, 1))
    return from_flags(
        RunSettings, args, work_dir=work_dir, keep_last=keep_last, log_interval=log_interval
    )


def optimizer_settings(args: argparse.Namespace, plan: Plan) -> OptimizerSettings:
    """Return what the optimizer and its schedule obey."""
    return from_flags(OptimizerSettings, args, max_step=plan.max_step, warmup_step=plan.warmup_step)


def scoring_settings(args: argparse.Namespace) -> Scoring:
    """Return what a validation measures, and by what the best adapter is chosen."""
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    scoring = Scoring.of_flags(args.valid_metric, given)
    scoring.check(args.valid_data, args.vocab)
    return scoring


def build_model(
    args: argparse.Namespace, base: BaseWeights | None, tokenizer: Tokenizer | None
) -> GPT2LMModel:
    """The model with its base loaded and the right parameters trainable."""
    vocabulary = {}
    if base is None and tokenizer is not None:
        vocabulary = {"vocab_size": tokenizer.get_vocab_size()}
    settings = adapter_settings(args)
    config = checkpoints.model_config(args.model_card, base, **settings, **vocabulary)
    if tokenizer is not None and base is not None:
        base.check_vocabulary(tokenizer, args.vocab)
    virtual_tokens = config.n_positions - config.window
    checkpoints.check_window(args.seq_len, config.n_positions, virtual_tokens)
    for name in ("lora_dim", "adapter_dim"):
        if (width := getattr(args, name) or 0) > config.n_embd:
            raise InputError(f"--{name} {width} is above the model's width {config.n_embd}")
    model = GPT2LMModel(config)
    if base is not None:
        checkpoints.load_base(model, base)
    choose_trained(args, model)
    lora.start_from_base(model)
    return model


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about the adapter, as fields of `GPT2Config`; empty for none."""
    targets = checkpoints.parse_targets(args.lora_targets)
    if args.method in BOTTLENECKS:
        return {"bottleneck": BottleneckConfig(args.adapter_dim, args.method)}
    if args.method == "prefix":
        if args.prefix_hidden > LARGEST_HIDDEN:
            raise InputError(
                f"--prefix_hidden {args.prefix_hidden} must be at most {LARGEST_HIDDEN}"
            )
        return {"prefix": PrefixConfig(args.prefix_length, args.prefix_hidden)}
    if args.method != "lora":
        return {}
    try:
        config = lora.LoraConfig(
            args.lora_dim,
            args.lora_alpha,
            args.lora_dropout,
            targets,
            args.lora_kind,
            args.use_rslora,
        )
    except ValueError as error:
        raise InputError(f"--lora_dim, --lora_alpha or --lora_targets: {error}") from error
    return {"lora": config}


def choose_trained(args: argparse.Namespace, model: GPT2LMModel) -> None:
    """Freeze what the method does not train: the base under an adapter; all but the biases or but
    the last blocks; with full nothing."""
    blocks, ln_f = model.transformer.h, model.transformer.ln_f
    if args.method in ("lora", "bitfit"):
        lora.mark_only_lora_as_trainable(model, args.train_bias)
    elif args.method in ADDITIONS:
        train_added(model)
    elif args.method == "top2":
        train_only(model, *blocks[-2:], ln_f)
    elif args.method == "top":
        if args.train_top > len(blocks):
            raise InputError(f"--train_top {args.train_top} is more than {len(blocks)} blocks")
        train_only(model, *blocks[-args.train_top :])


def method_of(args: argparse.Namespace) -> str:
    """What is trained, as adapter headers say it."""
    return "bias" if args.method == "bitfit" else args.method


def load_data(
    args: argparse.Namespace, runtime: Runtime, tokenizer: Tokenizer | None, config: GPT2Config
) -> tuple[FT_Dataset, FT_Dataset | None]:
    """Return training and validation rows; says how many were too long for the window."""

    def load(path: str) -> FT_Dataset:
        check_shareable(path, runtime.world_size)
        data = FT_Dataset(
            path,
            args.seq_len,
            joint_lm=args.obj == "jlm",
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            fields=args.fields,
        )
        if runtime.rank == 0:
            print(
                f"{path}: {len(data):,} rows ({data.rows.source}); cut to --seq_len "
                f"{args.seq_len}: {data.contexts_cut} contexts, {data.completions_cut} completions"
            )
        return data

    train = load(args.train_data)
    return train, load(args.valid_data) if args.valid_data else None


def texts_to_score(
    scoring: Scoring, valid: FT_Dataset | None, tokenizer: Tokenizer | None, config: GPT2Config
) -> ValidTexts | None:
    """Return what the scores of validation texts are taken of, None where there are no scores."""
    if not scoring.scores or valid is None or tokenizer is None:
        return None
    return ValidTexts.of_rows(scoring, valid.rows, tokenizer, config.window)


def plan_steps(args: argparse.Namespace, runtime: Runtime, rows: int, state: State | None) -> Plan:
    """Return the plan of a run over `rows` rows. It keeps the global batch of a resumed run where
    the number of processes has changed.

    Raises:
        InputError: this number of processes cannot make that global batch.
    """
    per_micro_batch, grad_acc = args.train_batch_size * runtime.world_size, args.grad_acc
    if state is not None and len(state.ranks) != runtime.world_size:
        before = (state.header.settings or {}).get("global_batch", 0)
        if not before or before % per_micro_batch:
            raise InputError(
                f"--resume: the run has a global batch of {before}, which {runtime.world_size} "
                f"processes of --train_batch_size {args.train_batch_size} cannot make; change one"
            )
        grad_acc = before // per_micro_batch
    steps_per_epoch = math.ceil(rows / (per_micro_batch * grad_acc))
    max_step, max_epoch, warmup = args.max_step, args.max_epoch, args.warmup_step
    if max_step is None:
        max_epoch = max_epoch or DEFAULT_EPOCHS
        max_step = steps_per_epoch * max_epoch
    return Plan(
        global_batch=per_micro_batch * grad_acc,
        grad_acc=grad_acc,
        steps_per_epoch=steps_per_epoch,
        max_step=max_step,
        max_epoch=max_epoch,
        warmup_step=min(RECIPE_WARMUP, max_step // 10) if warmup is None else warmup,
    )


def sampler_of(args: argparse.Namespace, runtime: Runtime, plan: Plan, rows: int) -> EpochSampler:
    """Return the sampler that gives this rank its rows."""
    return EpochSampler(
        rows, args.train_batch_size, plan.grad_acc, runtime.world_size, runtime.rank,
        args.random_seed,
    )  # fmt: skip


def resolved_flags(
    args: argparse.Namespace,
    runtime: Runtime,
    plan: Plan,
    settings: RunSettings,
    model: GPT2LMModel,
) -> dict[str, object]:
    """Return every flag with the value it came to, and what else people compare runs by."""
    place = {
        "rank": runtime.rank,
        "world_size": runtime.world_size,
        "local_rank": runtime.local_rank,
        "device": str(runtime.device),
        "work_dir": str(settings.work_dir),
    }
    own = {
        "model_card": checkpoints.card_of(model.state_dict()),
        "trained_parameters": trained_parameters(model),
        "saved_parameters": saved_parameters(model),
    }
    return vars(args) | asdict(plan) | asdict(settings) | place | own


def describe_adapter(
    args: argparse.Namespace,
    plan: Plan,
    model: GPT2LMModel,
    tokenizer: Tokenizer | None,
    fingerprint: str,
    train_data: str,
) -> AdapterHeader:
    """Return the header of the run's adapter files, all but the step: what decides them.

    `fingerprint` is the base's, `train_data` the sha256 of the bytes that the training rows were
    read from.
    """
    resolved = vars(args) | asdict(plan)
    given = {name: value for name in ("fields", "base_dtype") if (value := resolved[name])}
    if args.method == "prefix":
        given["prefix_hidden"] = args.prefix_hidden
    return AdapterHeader(
        lora=model.config.lora,
        base=Base(Path(args.init_checkpoint).name, fingerprint),
        method=method_of(args),
        model_card=checkpoints.card_of(model.state_dict()),
        vocabulary=tokenizer and Vocabulary.of(tokenizer),
        seed=args.random_seed,
        train_data=train_data,
        settings={name: resolved[name] for name in RESULT_SETTINGS} | given,
        bottleneck=model.config.bottleneck,
        prefix=model.config.prefix and PrefixConfig(model.config.prefix.length),
    )
