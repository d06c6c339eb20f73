"""sacreBLEU's tokenizers by name, loaded when they are first used."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

# Of mteval, of mteval for any script, of Chinese, characters, and blanks alone.
TOKENIZERS = {
    "13a": "tokenizer_13a.Tokenizer13a",
    "intl": "tokenizer_intl.TokenizerV14International",
    "zh": "tokenizer_zh.TokenizerZh",
    "char": "tokenizer_char.TokenizerChar",
    "none": "tokenizer_none.NoneTokenizer",
}


@cache
def tokenizer(name: str) -> Callable[[str], str]:
    """A function that sets blanks between the tokens of a text; `name` is one of TOKENIZERS."""
    module, _, of_module = TOKENIZERS[name].partition(".")
    made: Callable[[str], str] = getattr(
        import_module(f"sacrebleu.tokenizers.{module}"), of_module
    )()
    return made
