"""The flags of training: what they are, with the E2E recipe as defaults, and their ranges."""

import argparse
import math
from collections.abc import Iterable, Mapping

import loralib as lora
from common.errors import InputError
from data.fields import add_fields_flag
from decoding import SearchSettings
from eval.choice import LOSS, SCORES
from eval.metrics import METRICS
from methods import BOTTLENECKS
from model import ALL_TARGETS, LORA_TARGETS, MODEL_CARDS

DEFAULT_EPOCHS, RECIPE_LOG_INTERVAL, FULL_KEEPS = 5, 100, 2
RECIPE_SEQ_LEN = 512
# Each method with what it means for the older flags, which spell some of the methods too.
WITHOUT_LORA: dict[str, object] = {"lora_dim": 0, "train_bias": "none", "train_top": 0}
METHODS: dict[str, dict[str, object]] = {
    "lora": {"train_top": 0},
    "adapter_l": WITHOUT_LORA,
    "adapter_h": WITHOUT_LORA,
    "prefix": WITHOUT_LORA,
    "full": WITHOUT_LORA,
    "top2": WITHOUT_LORA,
    "bitfit": WITHOUT_LORA | {"train_bias": "all"},
}
PAPER_DIMS = {"adapter_l": 6, "adapter_h": 112}  # table 3's, on GPT-2 medium
PAPER_PREFIX = {"prefix_length": 5, "prefix_hidden": 512}  # Li and Liang 2021, on E2E and WebNLG
LARGEST_HIDDEN = 2**16  # of a prefix's generator, as the largest rank
# Flags that only some methods have a use for.
OWN_FLAGS = {
    **dict.fromkeys(
        ("lora_alpha", "lora_dropout", "lora_targets", "lora_kind", "use_rslora",
         "lora_plus_ratio"), ("lora",)
    ),
    "adapter_dim": BOTTLENECKS,
    **dict.fromkeys(PAPER_PREFIX, ("prefix",)),
}  # fmt: skip
DROPPED_FLAGS = [
    "--roll_interval",
    "--roll_lr",
    "--roll_step",
    "--eval_epoch",
    "--rank",
    "--world_size",
]


class DroppedFlag(argparse.Action):
    """Refuses a flag that the original scripts parsed and never read."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        raise InputError(f"{option_string} never had an effect and was dropped; leave it out")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained on."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data", help="JSONL, JSON, CSV or TSV of contexts and completions (docs/data.md).")
    add("--valid_data", help="The same. Without it nothing is validated.")
    add_fields_flag(add)
    add("--vocab", help="Folder of the vocabulary, which text rows need.")
    add(
        "--seq_len",
        type=int,
        default=RECIPE_SEQ_LEN,
        help="The longest sequence, in tokens. Default: 512, and less where a prefix takes room.",
    )
    add(
        "--obj",
        choices=("clm", "jlm"),
        default="clm",
        help="The loss counts completions (clm, default), or contexts as well (jlm).",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--init_checkpoint",
        help="Base weights: a file, a folder, or gpt2[-medium, -large, -xl]; none for random ones.",
    )
    add(
        "--model_card",
        help=f"Size of the model: {', '.join(MODEL_CARDS)}. Default: the base's; for random "
        "weights gpt2.md.",
    )
    add(
        "--method",
        choices=METHODS,
        default="lora",
        help="What is trained: LoRA or another row of its paper's table 3 (docs/methods.md). "
        "Default: lora.",
    )
    add("--lora_dim", type=int, default=4, help="Rank r; 0 trains all weights. Default: 4.")
    add("--lora_alpha", type=float, default=32.0, help="The scaling is alpha / r. Default: 32.")
    add("--lora_dropout", type=float, default=0.1, help="On the adapter's input. Default: 0.1.")
    add(
        "--lora_targets",
        default="q,v",
        help=f"Comma-separated: {', '.join(LORA_TARGETS)}; all is {','.join(ALL_TARGETS)}; c_attn "
        "is q, k and v by one adapter. Default: q,v.",
    )
    add("--lora_kind", choices=lora.KINDS, default="lora", help="Default: lora (docs/lora.md).")
    add("--use_rslora", action="store_true", help="The scaling is alpha / sqrt(r).")
    add(
        "--train_bias",
        choices=("none", "lora_only", "all"),
        default="none",
        help="Biases that are trained too; all with --lora_dim 0 trains nothing else. "
        "Default: none.",
    )
    add(
        "--train_top",
        type=int,
        default=0,
        help="With --lora_dim 0: the last N blocks alone.",
    )
    add(
        "--adapter_dim",
        type=int,
        help="Width of the bottlenecks of --method adapter_l and adapter_h. Default: the paper's, "
        + " and ".join(f"{dim} of {method}" for method, dim in PAPER_DIMS.items())
        + ".",
    )
    add("--prefix_length", type=int, help="Virtual tokens of --method prefix. Default: 5.")
    add(
        "--prefix_hidden",
        type=int,
        help="Width of the network that makes the prefix in training; 0 for none. Default: 512.",
    )


def settle_method(given: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that follow from which method is trained, by --method or an older spelling.

    Args:
        given: the flags on the command line, without defaults.

    Raises:
        InputError: two of them contradict each other.
    """
    method = str(given["method"]) if "method" in given else _spelled_method(given)
    if "method" in given:
        settled = METHODS[method]
        wrong = [name for name, value in settled.items() if given.get(name, value) != value]
        if method == "lora" and given.get("lora_dim") == 0:
            wrong.append("lora_dim")
        if wrong:
            raise InputError(
                f"--{wrong[0]} {given[wrong[0]]} contradicts --method {method}; leave one of the "
                "two out"
            )
        _check_own_flags(given, method, OWN_FLAGS)
    else:
        settled = {}
        _check_own_flags(given, method, ["adapter_dim", *PAPER_PREFIX])
    prefix = PAPER_PREFIX if method == "prefix" else {}
    length = int(str((prefix | dict(given)).get("prefix_length", 0)))
    window = max(RECIPE_SEQ_LEN - length, 2)  # so that one of 512 has room for the prefix too
    own = {"adapter_dim": PAPER_DIMS.get(method), "seq_len": window}
    return {"method": method} | own | prefix | settled


def check_points_of_cycle(given: Mapping[str, object]) -> None:
    """Refuse a cycle without its rates, and its points without it.

    Args:
        given: the flags on the command line, without defaults.

    Raises:
        InputError: says which flag is missing or without use.
    """
    if given.get("scheduler") == "cycle":
        if "i_lrs" not in given:
            raise InputError("--scheduler cycle needs --i_lrs, the rate at each of --i_steps")
    elif points := [name for name in ("i_steps", "i_lrs") if name in given]:
        raise InputError(
            f"--{points[0]} is for --scheduler cycle; give that too, or leave --{points[0]} out"
        )


def _spelled_method(given: Mapping[str, object]) -> str:
    """The method that is given by --lora_dim, --train_bias and --train_top alone."""
    bias, top = given.get("train_bias", "none"), given.get("train_top", 0)
    without_lora = given.get("lora_dim") == 0
    if top and (not without_lora or bias != "none"):
        raise InputError("--train_top goes with --lora_dim 0 and --train_bias none")
    if not without_lora:
        return "lora"
    if bias == "lora_only":
        raise InputError("--train_bias lora_only with --lora_dim 0 would train nothing")
    return "bitfit" if bias == "all" else "top" if top else "full"


def _check_own_flags(given: Mapping[str, object], method: str, names: Iterable[str]) -> None:
    for name in names:
        if name in given and method not in OWN_FLAGS[name]:
            owners = " and ".join(OWN_FLAGS[name])
            raise InputError(f"--{name} is for --method {owners}, this is {method}; leave it out")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how it is trained."""
    add = parser.add_argument_group("training").add_argument
    add(
        "--train_batch_size",
        type=int,
        default=8,
        help="Rows per process and micro-batch. Default: 8.",
    )
    add("--grad_acc", type=int, default=1, help="Micro-batches per step. Default: 1.")
    add("--max_epoch", type=int, help=f"Default: {DEFAULT_EPOCHS}, or none with --max_step.")
    add("--max_step", type=int, help="Training stops after this many steps.")
    add("--label_smooth", type=float, default=0.1, help="In training only. Default: 0.1.")
    add("--clip", type=float, default=0.0, help="Largest gradient norm; 0, the default, is none.")
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="Computes activations twice, which takes less memory and more time.",
    )
    add(
        "--compile",
        action="store_true",
        help="Compiles the blocks (torch.compile), for runs long enough (docs/performance.md).",
    )
    add(
        "--cuda_graphs",
        action="store_true",
        help="Records the kernels of a step once for each size of batch and launches them at once "
        "from then on, for small models on a GPU (docs/gpu.md).",
    )
    add(
        "--base_dtype",
        choices=("bf16", "fp16"),
        help="Holds the frozen base in the half that --bf16 or --fp16 computes in, which takes "
        "less memory.",
    )
    add(
        "--max_bad_steps",
        type=int,
        default=25,
        help="The run ends after this many steps in a row that are not finite. Default: 25.",
    )


def add_validation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how it is validated."""
    add = parser.add_argument_group("validation").add_argument
    add(
        "--eval_interval",
        type=int,
        default=2000,
        help="Steps between validations; each epoch ends with one, too. Default: 2000.",
    )
    add(
        "--patience",
        type=int,
        default=0,
        help="Training stops after this many validations without a better one; 0 is never.",
    )
    add("--valid_batch_size", type=int, default=4, help="It changes no result. Default: 4.")
    add("--valid_samples", type=int, default=3, help="Texts to show in TensorBoard. Default: 3.")
    add(
        "--valid_metric",
        default=LOSS,
        help=f"Comma-separated: {', '.join((LOSS, *SCORES))}. The first decides which adapter is "
        "the best and what --patience counts. For scores the contexts are decoded at each "
        "validation. Default: loss.",
    )
    add(
        "--valid_task",
        choices=METRICS,
        help="Whose scores they are. Default: own; e2e with nist or ser, which it alone has.",
    )
    add("--valid_texts", type=int, help="Only the first N contexts are decoded. Default: all.")
    search = SearchSettings()
    add("--valid_beam", type=int, help=f"As gpt2_beam.py's --beam. Default: {search.beam}.")
    add("--valid_eval_len", type=int, help=f"As its --eval_len. Default: {search.eval_len}.")
    add(
        "--valid_length_penalty",
        type=float,
        help=f"As its --length_penalty. Default: {search.length_penalty}.",
    )
    add(
        "--valid_no_repeat_ngram_size",
        type=int,
        help=f"As its --no_repeat_ngram_size. Default: {search.no_repeat_ngram_size}.",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is written, and how a run resumes."""
    add = parser.add_argument_group("output").add_argument
    add("--work_dir", help="Folder of the run. Default: the next free runs/NNN.")
    add("--resume", help="auto, or a work_dir: the run resumes from its last save there.")
    add(
        "--resume_anyway",
        action="store_true",
        help="It resumes although settings that change its result have changed.",
    )
    add(
        "--save_interval",
        type=int,
        default=500,
        help="Steps between saves; each epoch ends with one, too. Default: 500.",
    )
    add("--save_minutes", type=float, default=0, help="Minutes between further saves; 0 is none.")
    add(
        "--keep_last",
        type=int,
        help="Numbered adapters to keep; 0 keeps all. Default: 0, or "
        f"{FULL_KEEPS} where all weights are trained.",
    )
    add(
        "--log_interval",
        type=int,
        help=f"Steps between log lines. Default: {RECIPE_LOG_INTERVAL}, or a tenth of the steps "
        "where that is less.",
    )
    add("--csv", action="store_true", help="Writes the log as log.csv, too.")
    add("--wandb", metavar="PROJECT", help="Sends the log to Weights & Biases, if installed.")
    add(
        "--dry_run",
        action="store_true",
        help="Checks the flags and the data, prints sizes, steps and disk, and ends.",
    )


def add_dropped_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the original scripts that are refused."""
    for flag in DROPPED_FLAGS:
        parser.add_argument(
            flag, action=DroppedFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse flags that are missing or out of their range.

    Raises:
        InputError: names the flag and its range.
    """
    if not args.train_data:
        raise InputError("--train_data is missing; give a file of contexts and completions")
    if not args.init_checkpoint:
        raise InputError(
            "--init_checkpoint is missing; give the base weights, or none for random ones"
        )
    least = {
        "train_batch_size": 1, "valid_batch_size": 1, "grad_acc": 1, "seq_len": 2, "lora_dim": 0,
        "log_interval": 1, "eval_interval": 1, "save_interval": 1, "save_minutes": 0,
        "keep_last": 0, "patience": 0, "max_bad_steps": 1, "max_step": 1, "max_epoch": 1,
        "valid_samples": 0, "clip": 0, "weight_decay": 0, "adam_epsilon": 0, "random_seed": 0,
        "train_top": 0, "adapter_dim": 1, "prefix_length": 1, "prefix_hidden": 0,
        "valid_texts": 1,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < 2**63:
            raise InputError(f"--{name} {value} must be at least {bound} and below 2**63")
    if args.patience and not args.valid_data:
        raise InputError("--patience counts validations; give --valid_data, or leave it out")
    for name in ("lora_dropout", "label_smooth", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be in [0, 1)")
    for name in ("lora_alpha", "lr", "lora_plus_ratio"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)} must be above 0 and finite")
