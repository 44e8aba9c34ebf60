"""Rows in, examples out: read → Conversation → check → split → render → pack. No torch left of packing."""
