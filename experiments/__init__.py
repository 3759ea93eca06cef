"""Experiment scripts: `python -m experiments.train` for one run, `python -m experiments.compare` for the main job.

config    what a run is, and the presets of each data set
data      images and labels in memory; augmentation
methods   the methods compared, as Optax pipelines
train     the trainer
runs      run folders: config, environment, metrics, checkpoint
compare   methods x seeds: train, quantize, measure curvature, one table
hessian   the curvature of a saved run
quantize  saved runs at low bit widths, their layers, bits for each
plots     the figures
"""
