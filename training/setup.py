"""From arguments to a run that is ready to train: data, model, optimizer, steps, header."""

import argparse
import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.amp import GradScaler

import checkpoints
import gpu
import loralib as lora
from checkpoints import AdapterHeader, Base, Vocabulary
from common.errors import InputError
from data_utils import EpochSampler, FT_Dataset, load_tokenizer, vocabulary_fingerprint
from model import GPT2Config, GPT2LMModel
from optimizer import create_adam_optimizer_from_args, create_optimizer_scheduler
from training.resume import check_settings, restore
from training.run import Run

DEFAULT_EPOCHS = 5

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


def prepare(args: argparse.Namespace, state: dict | None) -> Run:
    """Data, model, optimizer and schedule, put back to `state` if there is one."""
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    base = None if args.init_checkpoint == "none" else checkpoints.read_base(args.init_checkpoint)
    gpu.seed_everything(args.random_seed)
    model = build_model(args, base, tokenizer)
    train, valid = load_data(args, tokenizer, model.config)
    sampler = plan_steps(args, len(train), state)
    header = describe_adapter(args, model, tokenizer)
    if state is not None and not args.resume_anyway:
        check_settings(state, header)
    model.transformer.gradient_checkpointing = args.gradient_checkpointing
    model.to(args.device).train()
    optimizer = create_adam_optimizer_from_args(model, args)
    scheduler = create_optimizer_scheduler(optimizer, args)
    scaler = GradScaler(args.device.type, enabled=args.fp16)
    # Equal models on all ranks, but dropout of their own.
    gpu.seed_everything(args.random_seed + args.rank)
    wrapped = gpu.distributed_opt(args, model)
    run = Run(args, wrapped, optimizer, scheduler, scaler, train, valid, sampler, header, tokenizer)
    if state is not None:
        restore(run, state)
    return run


def show_plan(args: argparse.Namespace) -> None:
    """Print the sizes of the run that these arguments start. Nothing is written, and no weights
    are read or made: the model has the card's own shape."""
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    with torch.device("meta"):
        model = build_model(args, None, tokenizer)
    train, _ = load_data(args, tokenizer, model.config)
    sampler = plan_steps(args, len(train), None)
    if args.rank == 0:
        print_sizes(args, model, sampler)


def build_model(
    args: argparse.Namespace, base: dict[str, Tensor] | None, tokenizer: Tokenizer | None
) -> GPT2LMModel:
    """The model with its base loaded and the right parameters trainable."""
    vocabulary = {}
    if base is None and tokenizer is not None:
        vocabulary = {"vocab_size": tokenizer.get_vocab_size()}
    lora_config = adapter_settings(args)
    config = checkpoints.model_config(args.model_card, base, lora=lora_config, **vocabulary)
    if tokenizer is not None and tokenizer.get_vocab_size() != config.vocab_size:
        raise InputError(
            f"--vocab {args.vocab} has {tokenizer.get_vocab_size()} entries but --init_checkpoint "
            f"{args.init_checkpoint} {config.vocab_size}; give the vocabulary of that base"
        )
    if args.seq_len > config.n_positions:
        raise InputError(f"--seq_len {args.seq_len} is above the model's {config.n_positions}")
    if args.lora_dim > config.n_embd:
        raise InputError(f"--lora_dim {args.lora_dim} is above the model's width {config.n_embd}")
    model = GPT2LMModel(config)
    if base is not None:
        checkpoints.load_base(model, base, args.init_checkpoint)
    choose_trained(args, model)
    lora.start_from_base(model)
    return model


def adapter_settings(args: argparse.Namespace) -> lora.LoraConfig | None:
    """What the flags say about the adapter, None for none."""
    targets = checkpoints.parse_targets(args.lora_targets)
    if not args.lora_dim:
        return None
    try:
        return lora.LoraConfig(
            args.lora_dim,
            args.lora_alpha,
            args.lora_dropout,
            targets,
            args.lora_kind,
            args.use_rslora,
        )
    except ValueError as error:
        raise InputError(f"--lora_dim, --lora_alpha or --lora_targets: {error}") from error


def choose_trained(args: argparse.Namespace, model: GPT2LMModel) -> None:
    """Freeze what the arguments do not train: the base beside an adapter; all but the biases
    (BitFit; Ben Zaken et al. 2022, arXiv:2106.10199) or but the last blocks; else nothing.
    Settles `args.trained_parameters`."""
    if args.lora_dim or args.train_bias == "all":
        if args.train_top:
            raise InputError("--train_top goes with --lora_dim 0 and --train_bias none")
        lora.mark_only_lora_as_trainable(model, args.train_bias)
    elif args.train_bias != "none":
        raise InputError("--train_bias lora_only with --lora_dim 0 would train nothing")
    elif args.train_top:
        if args.train_top > model.config.n_layer:
            raise InputError(
                f"--train_top {args.train_top} is more than {model.config.n_layer} blocks"
            )
        model.requires_grad_(False)
        model.transformer.h[-args.train_top :].requires_grad_()
    args.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)


def method_of(args: argparse.Namespace) -> str:
    """What is trained, as adapter headers say it."""
    if args.lora_dim:
        return "lora"
    return "bias" if args.train_bias == "all" else "top" if args.train_top else "full"


def load_data(
    args: argparse.Namespace, tokenizer: Tokenizer | None, config: GPT2Config
) -> tuple[FT_Dataset, FT_Dataset | None]:
    """Training and validation rows; says how many were too long for the window."""
    sets = []
    for path, size in (
        (args.train_data, args.train_batch_size),
        (args.valid_data, args.valid_batch_size),
    ):
        if path is None:
            sets.append(None)
            continue
        data = FT_Dataset(
            path,
            size,
            args.seq_len,
            joint_lm=args.obj == "jlm",
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
        )
        if args.rank == 0:
            print(
                f"{path}: {len(data):,} rows; cut to --seq_len {args.seq_len}: "
                f"{data.contexts_cut} contexts, {data.completions_cut} completions"
            )
        sets.append(data)
    return sets[0], sets[1]


def plan_steps(args: argparse.Namespace, rows: int, state: dict | None) -> EpochSampler:
    """The sampler of the run; settles `args.max_step` and `args.global_batch`, and keeps the
    global batch of a resumed run where the number of processes has changed."""
    per_micro_batch = args.train_batch_size * args.world_size
    if state is not None and len(state["ranks"]) != args.world_size:
        wanted = state["header"]["settings"]["global_batch"]
        if wanted % per_micro_batch:
            raise InputError(
                f"--resume: the run has a global batch of {wanted}, which {args.world_size} "
                f"processes of --train_batch_size {args.train_batch_size} cannot make; change one"
            )
        args.grad_acc = wanted // per_micro_batch
    args.global_batch = per_micro_batch * args.grad_acc
    sampler = EpochSampler(
        rows, args.train_batch_size, args.grad_acc, args.world_size, args.rank, args.random_seed
    )
    if args.max_step is None:
        args.max_epoch = args.max_epoch or DEFAULT_EPOCHS
        args.max_step = sampler.steps_per_epoch * args.max_epoch
    return sampler


def describe_adapter(
    args: argparse.Namespace, model: GPT2LMModel, tokenizer: Tokenizer | None
) -> AdapterHeader:
    """The header of the run's adapter files, all but the step: what decides their content."""
    vocabulary = tokenizer and Vocabulary(
        tokenizer.get_vocab_size(), vocabulary_fingerprint(tokenizer)
    )
    base = checkpoints.base_fingerprint(model.state_dict())
    return AdapterHeader(
        lora=model.config.lora,
        base=Base(Path(args.init_checkpoint).name, base),
        method=method_of(args),
        model_card=args.model_card,
        vocabulary=vocabulary,
        seed=args.random_seed,
        train_data=hashlib.sha256(Path(args.train_data).read_bytes()).hexdigest(),
        settings={name: getattr(args, name) for name in RESULT_SETTINGS},
    )


def print_args(args: argparse.Namespace) -> None:
    """All settings of the run."""
    print("Settings: " + ", ".join(f"{name} {value}" for name, value in sorted(vars(args).items())))


def print_sizes(args: argparse.Namespace, model: nn.Module, sampler: EpochSampler) -> None:
    """What is trained and for how long."""
    total = sum(p.numel() for p in model.parameters())
    folder = args.work_dir or "the next runs/NNN"
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    print(
        f"{args.model_card}: {args.trained_parameters:,} trainable parameters of {total:,}, "
        f"{precision} on {args.device}, {args.world_size} process(es); {sampler.rows:,} rows in "
        f"steps of {args.global_batch}, {sampler.steps_per_epoch:,} steps an epoch, "
        f"{args.max_step:,} in all; into {folder}"
    )
