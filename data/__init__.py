"""Data sets: converters from the raw files, downloads, and the sample set with its nano base."""
