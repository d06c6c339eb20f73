"""Prompts typed by hand: those of the command line, or one after another at a terminal.

Answers go to stdout, a line for each text: its score and, where several models answer, before it
the name of the model, separated by tabs. Everything else goes to stderr.
"""

import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import checkpoints
from common.errors import InputError
from decoding.beam_search import Hypothesis, SearchSettings
from decoding.generate import SAMPLING, SEARCH, Settings, complete, encode_contexts, text_of
from decoding.sampling import SamplingSettings
from decoding.sources import Task
from gpu import Runtime
from model import GPT2LMModel

HELP = """\
Type a context as in the data, such as name : Blue Spice | food : Chinese, or a command:
  :adapter NAME     answer by this adapter, or by that of a file or a run; without NAME, list them
  :base             answer by the base alone
  :both             answer by the adapter and by the base
  :set NAME VALUE   change a setting, as in :set beam 4 or :set do_sample on; without, list them
  :help             list the commands
  :quit             end, as does Ctrl-D; Ctrl-C stops an answer"""
SHARED = ("eval_len", "end_ids", "min_length", "repetition_penalty")


@dataclass(frozen=True)
class Choices:
    """How texts are made. The settings of the other method are kept for when it is chosen."""

    do_sample: bool
    num_return_sequences: int
    search: SearchSettings
    sampling: SamplingSettings

    def __post_init__(self) -> None:
        self.settings.check_count(self.num_return_sequences)

    @classmethod
    def of(cls, settings: Settings, num_return_sequences: int) -> "Choices":
        """Return these settings as the choice; the other method takes over what holds for any."""
        shared = {name: getattr(settings, name) for name in SHARED}
        if isinstance(settings, SamplingSettings):
            return cls(True, num_return_sequences, SearchSettings(**shared), settings)
        return cls(False, num_return_sequences, settings, SamplingSettings(**shared))

    @property
    def settings(self) -> Settings:
        """The settings of the method that is chosen."""
        return self.sampling if self.do_sample else self.search

    def values(self) -> dict[str, Any]:
        """Return what `change` can change and has an effect now."""
        own = {k: v for k, v in asdict(self.settings).items() if k != "end_ids"}
        method = {
            "do_sample": "on" if self.do_sample else "off",
            "num_return_sequences": self.num_return_sequences,
        }
        return method | dict(sorted(own.items()))

    def change(self, name: str, text: str) -> "Choices":
        """Return the choices with a setting changed to the value that a text says.

        Raises:
            InputError: there is no such setting, or this is no value for it.
        """
        try:
            if name == "do_sample":
                return replace(self, do_sample=_switched_on(text))
            if name == "num_return_sequences":
                return replace(self, num_return_sequences=_parsed(name, text, 1))
            changed: dict[str, Any] = {}
            for method, names in (("search", SEARCH), ("sampling", SAMPLING)):
                if name in names - {"end_ids"}:
                    own = getattr(self, method)
                    value = _parsed(name, text, getattr(own, name))
                    changed[method] = replace(own, **{name: value})
            if not changed:
                raise InputError(f"{name!r} is no setting; :set lists them")
            return replace(self, **changed)
        except ValueError as error:
            raise InputError(str(error)) from error


def _switched_on(text: str) -> bool:
    if text not in ("on", "off"):
        raise InputError(f"do_sample is on or off, not {text!r}")
    return text == "on"


def _parsed(name: str, text: str, like: Any) -> Any:
    """The value that a text says, of the same type as another one."""
    try:
        return type(like)(text)
    except ValueError:
        number = "a whole number" if isinstance(like, int) else "a number"
        raise InputError(f"{name} is {number}, not {text!r}") from None


class Session:
    """Models that answer prompts, one after another; the n-th prompt is sampled as number n - 1."""

    def __init__(
        self,
        load: Callable[[Path | None], GPT2LMModel],
        adapters: Mapping[str, Path],
        tokenizer: Tokenizer,
        runtime: Runtime,
        window: int,
        choices: Choices,
        with_base: bool = False,
    ) -> None:
        """All `adapters` answer at first, or the base where there is none.

        Args:
            load: returns the model of an adapter's file, or the base alone for None, and the same
                one each time.
            window: tokens of room for a prompt and its text, fewer where a model has fewer.
            with_base: whether the base answers too.
        """
        self.load, self.tokenizer, self.runtime = load, tokenizer, runtime
        self.paths: dict[Task, Path | None] = {None: None} | dict(adapters)
        self.window, self.choices, self.asked = window, choices, 0
        self.names: list[Task] = [*adapters, None] if with_base or not adapters else [*adapters]

    def answer(self, texts: Sequence[str]) -> None:
        """Print what the chosen models make of each prompt.

        Raises:
            InputError: a prompt is empty, too long or not text; nothing has been printed then.
        """
        prompts = [torch.tensor(ids, device=self.runtime.device) for ids in self.encode(texts)]
        settings, count = self.choices.settings, self.choices.num_return_sequences
        numbers = range(self.asked, self.asked + len(prompts))
        found = {}
        for name in self.names:
            try:
                with self.runtime.autocast():
                    found[name] = complete(
                        self.load(self.paths[name]), prompts, settings, 16, count, None, numbers
                    )
            except ValueError as error:
                raise InputError(f"{name or 'base'}: {error}") from error
        self.asked += len(prompts)
        for number, text in enumerate(texts):
            if len(texts) > 1:
                say(text)
            for name, of_prompts in found.items():
                self.print_texts(name, of_prompts[number])
        sys.stdout.flush()
        everything = [h for of_prompts in found.values() for best in of_prompts for h in best]
        if unfinished := sum(not h.finished for h in everything):
            length = f"eval_len {settings.eval_len}"
            say(f"{unfinished} of {len(everything)} texts did not end within {length}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the prompts as token ids, each of which leaves room for a text."""
        for text in texts:
            if not text.strip():
                raise InputError("the prompt is empty; give a context as in the data")
            if not text.isascii() and any(unicodedata.category(c) == "Cs" for c in text):
                raise InputError(f"prompt {text[:40] + '…'!r} is not UTF-8")
        eval_len = self.choices.settings.eval_len
        models = (self.load(self.paths[name]) for name in self.names)
        window = min(self.window, *(model.config.window for model in models))
        encoded = encode_contexts(self.tokenizer, texts)
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) > window - eval_len:
                raise InputError(
                    f"prompt {text[:40] + '…'!r} is too long: its {len(ids)} tokens and eval_len "
                    f"{eval_len} exceed the window of {window}; shorten it, or lower eval_len"
                )
        return encoded

    def print_texts(self, name: Task, hypotheses: Sequence[Hypothesis]) -> None:
        label = [name or "base"] if len(self.names) > 1 else []
        for hypothesis in hypotheses:
            text = one_line(text_of(hypothesis, self.tokenizer))
            print(*label, f"{hypothesis.score:.4f}", text, sep="\t")

    def command(self, line: str) -> None:
        """Carry out a command, given without its colon; raise InputError for one that is none."""
        word, _, rest = line.partition(" ")
        match word, rest.split(maxsplit=1):
            case "help", []:
                say(HELP)
            case "base", []:
                self.choose([None])
            case "both", []:
                self.choose([*self.adapters(), None])
            case "adapter", []:
                say(", ".join(filter(None, self.paths)) or "no adapters; :adapter FILE loads one")
            case "adapter", _:
                self.choose([self.find(rest.strip())])
            case "set", []:
                say(", ".join(f"{name} {value}" for name, value in self.choices.values().items()))
            case "set", [name, value]:
                self.set(name, value.strip())
            case _:
                raise InputError(f":{line} is no command; :help lists them")

    def adapters(self) -> list[str]:
        """Return those that answer or, where none does, all."""
        names = [name for name in self.names if name] or [name for name in self.paths if name]
        if not names:
            raise InputError("there is no adapter; :adapter FILE loads one")
        return names

    def find(self, name: str) -> str:
        """Return the name of an adapter, which is added where it is that of a file or a run."""
        if name not in self.paths:
            try:
                path, _ = checkpoints.find_adapter(name)
            except InputError as error:
                known = ", ".join(filter(None, self.paths)) or "none"
                raise InputError(f"{error}; loaded by name: {known}") from error
            self.load(path)
            self.paths[name] = path
        return name

    def choose(self, names: list[Task]) -> None:
        """Let these models answer from now on."""
        for name in names:
            self.load(self.paths[name])
        self.names = names
        say(self.describe())

    def describe(self) -> str:
        """Say who answers and how."""
        names = " and ".join(name or "the base" for name in self.names)
        method = "sampling" if self.choices.do_sample else f"beam {self.choices.search.beam}"
        return f"answering: {names} ({method})"

    def set(self, name: str, value: str) -> None:
        """Change a setting."""
        self.choices = self.choices.change(name, value)
        if name == "seed":
            self.asked = 0
        if name not in self.choices.values():
            other = "off" if self.choices.do_sample else "on"
            say(f"{name} has an effect once do_sample is {other}")


def converse(session: Session) -> None:
    """Ask for one prompt after another at the terminal until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing; Windows lacks it
    say(f"{session.describe()}; :help lists the commands")
    while True:
        try:
            line = read_line()
            if line.strip() in (":quit", ":q"):
                return
            if line.startswith(":"):
                session.command(line[1:].strip())
            elif line.strip():
                session.answer([line])
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("stopped; :quit ends the program")
        except InputError as error:
            say(f"error: {error}")
        except UnicodeDecodeError:
            say("error: the line is not UTF-8")


def read_line() -> str:
    """Return a line that is typed; what asks for it is not part of the output."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def say(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return a text with escapes in place of ends of lines and of what controls a terminal."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Zl", "Zp")
        else char
        for char in text
    )
