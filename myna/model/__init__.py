"""Base models: where they come from, how they are loaded, which families are known."""
