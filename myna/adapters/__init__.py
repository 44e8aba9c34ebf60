"""Adapters: which methods there are (one table over peft), and their files."""
