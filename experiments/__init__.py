"""The paper's experiments: `python -m experiments.train` for one run, `python -m experiments.reproduce` for all.

Commands
    train        one run: a folder that the same command continues
    compare      methods x seeds, quantized and measured, in one table: the main job
    search       rho and gamma on held-out images
    reproduce    everything on one data set, and its report
    hessian      the curvature of a saved run
    quantize     saved runs at low bit widths, their layers, bits for each
    landscape    the loss around saved runs and between them
    report       one page from run folders
    prepare      downloads and prepares a data set

A run
    config       what it is; presets: what it takes where that is left open
    data         images and labels, augmentation; streams: those that stay on disk
    prepared     data sets that tensorflow-datasets has prepared
    label_noise  wrong labels for some of the training images
    methods      what is trained, as Optax pipelines
    trainer      its compiled parts; parallel: how they lie on devices
    runs         its folder; groups: folders of the same network
    sweep        many runs, of which none is made twice

What is seen
    cli, progress, tensorboard, tables, plots
"""
