"""The training step: packed, exact, and only where the loss is. See docs/train.md."""
