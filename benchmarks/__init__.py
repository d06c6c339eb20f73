"""Speed compared with transformers, peft and the original code."""
