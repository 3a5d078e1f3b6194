"""Readers of workloads: Gavel, Sia, Rubick, Philly, our own JSONL, and a seeded generator."""
