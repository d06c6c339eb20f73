"""Speed beside transformers, peft and the original code."""
