"""Cascades: a small model answers when it is sure, else a large one elsewhere does.

`records` and `config` are what is written down, `confidence`, `calibration` and `payload` are pure, `collect` asks two
models about labelled rows, and `backend` acts: it wraps any `modelyard.serving.protocol.Backend`.
"""
