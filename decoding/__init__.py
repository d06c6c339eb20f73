"""From prompts to texts: beam search, sampling, their cache, and `generate`, text to text."""

from decoding.beam_search import Hypothesis, SearchSettings, beam_search
from decoding.generate import generate, text_of
from decoding.sampling import SamplingSettings, sample

__all__ = ["Hypothesis", "SamplingSettings", "SearchSettings", "beam_search", "generate", "sample"]
__all__ += ["text_of"]
