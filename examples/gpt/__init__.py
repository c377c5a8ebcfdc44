"""A small GPT trained on real text, the same on any parallel layout: the example that `make demo` runs."""
