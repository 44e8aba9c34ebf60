"""From an adapter to the file that runs: merge, GGUF, quantizing, parity, the model card."""
