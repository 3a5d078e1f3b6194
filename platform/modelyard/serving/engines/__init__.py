"""Engines: token ids in, token ids out. One file per engine; `choice.py` says which one a model gets."""
