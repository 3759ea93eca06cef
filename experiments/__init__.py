"""The paper's experiments: `python -m experiments.train` for one run, `python -m experiments.reproduce` for all.

Commands, each of which calls what the rooms have and prints what comes of it
    train        one run: a folder that the same command continues
    compare      methods x seeds, quantized and measured, in one table: the main job
    search       rho and gamma on held-out images
    reproduce    everything on one data set, and its report
    hessian      the curvature of a saved run
    quantize     saved runs at low bit widths, their layers, bits for each
    landscape    the loss around saved runs and between them
    report       one page from run folders
    prepare      downloads and prepares a data set

Rooms, each of which knows those above it and none below
    config       what a run is, and what it takes where that is left open
    storage      run folders and other files, whole, checked, never through a link
    data         images and labels; those that stay on disk; wrong labels
    training     methods as Optax pipelines, compiled parts, layouts on devices, the loop
    measure      many runs, of which none is made twice
    analysis     saved runs in tables, plots and pages
"""

import sys

from experiments.training import interrupts

# As `python -m experiments.NAME`, which imports for seconds before it can take a signal.
if sys.argv[:1] == ["-m"]:
    interrupts.leave_at_once()
