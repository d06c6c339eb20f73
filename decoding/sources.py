"""Which data, base, vocabulary and adapters a decode reads: what is given, what the adapter's run
says of itself, or the shipped sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints
from checkpoints import FoundAdapter
from checkpoints.base import weight_files
from common.errors import InputError
from common.sample import sample_settings
from data_utils import vocabulary_files

Task = str | None  # the name of an adapter; None where there is one for all rows, or for the base


@dataclass(frozen=True)
class Sources:
    """The files of a decode. `adapters` has None for the base alone; `data` is empty where prompts
    are typed."""

    data: str
    init_checkpoint: str
    vocab: str | None
    adapters: Mapping[Task, FoundAdapter | None]
    is_sample: bool

    def files(self) -> dict[str, str | Path]:
        """Return every file that is read, by a name for messages."""
        weights = weight_files(self.init_checkpoint)
        vocabulary = vocabulary_files(self.vocab) if self.vocab else ()
        adapters = [found.path for found in self.adapters.values() if found]
        return {
            "--data": self.data,
            **{f"{path.name} of --init_checkpoint": path for path in weights},
            **{f"{path.name} of --vocab": path for path in vocabulary},
            **{f"{path.name} of --adapter": path for path in adapters},
        }

    def announce(self) -> None:
        """Print which files were chosen where the flags left a choice."""
        if self.is_sample:
            print(
                "Neither --data nor --init_checkpoint given: decoding the shipped sample. For your "
                "own: --data FILE --vocab FOLDER --init_checkpoint FILE --adapter FILE"
            )
        for task, found in self.adapters.items():
            if found:
                print(f"Adapter {f'{task} = ' if task else ''}{found.path}: {found.reason}")
            elif len(self.adapters) == 1:
                print(f"No --adapter: decoding with the base alone, {self.init_checkpoint}")


def choose_sources(
    data: str | None,
    init_checkpoint: str | None,
    vocab: str | None,
    adapter: Sequence[str] | None,
    prompts: bool = False,
) -> Sources:
    """Return the files that these flags mean.

    Base and vocabulary default to those of the first adapter's run; where neither data nor base is
    given, everything defaults to the shipped sample.

    Raises:
        InputError: one is neither given nor known.
    """
    adapters = {
        task: checkpoints.find_adapter(name) if name else None
        for task, name in name_adapters(adapter).items()
    }
    run = checkpoints.run_paths(filter(None, adapters.values()))
    sample = {} if data or init_checkpoint else sample_settings()
    base = init_checkpoint or run.get("init_checkpoint") or sample.get("init_checkpoint")
    data = "" if prompts else data or sample.get("test_data")
    if not base:
        raise InputError("--init_checkpoint is missing: an adapter means nothing without its base")
    if not data and not prompts:
        raise InputError("--data is missing; give a file with a context in each row")
    vocab = vocab or run.get("vocab") or sample.get("vocab")
    return Sources(data or "", base, vocab, adapters, bool(sample) and not prompts)


def name_adapters(given: Sequence[str] | None) -> dict[Task, str | None]:
    """Return task → adapter; the one task is None where no names are given."""
    if not given:
        return {None: None}
    if len(given) == 1 and ("=" not in given[0] or Path(given[0]).exists()):
        return {None: given[0]}
    named = dict(text.split("=", 1) for text in given if "=" in text)
    if len(named) != len(given):
        raise InputError(
            "--adapter is given more than once; each needs a name of its own: e2e=FILE"
        )
    return {None: None} | named
