"""Datasets: a corpus prepared once into packed shards, and read in an order no worker count can change."""
