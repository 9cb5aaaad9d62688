"""Shards to plans to batches. A batch is a pure function of (recipe, index, step).

    shards -> index -> lengths -> blend, plan     numbers only; the same on every rank
    records -> conversation -> encoding -> batches     one sample's text
    tiling -> images -> loader     pixels, in background threads
    prepare -> shards     writing

`assemble.build_data` joins them; the trainer needs it, `plan.DataPlan` and `loader.Loader`.
"""
