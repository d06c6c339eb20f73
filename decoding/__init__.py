"""From prompts to texts: beam search, its cache, and `generate`, text in and text out."""

from decoding.beam_search import Hypothesis, SearchSettings, beam_search
from decoding.generate import generate, text_of

__all__ = ["Hypothesis", "SearchSettings", "beam_search", "generate", "text_of"]
