"""sd-bench: the time and memory that a bundle takes on this machine.

cli           flags → Benchmark → Results → table, JSON, plots
benchmark     the whole flow, in the order that keeps measurements apart
processes     new sd-run processes, from their start to a picture on disk; peak memory, of the GPU too
stage_times   seconds of each stage of a picture; pictures a second by batch
load          latency of requests that arrive whether or not the last one is done
distribution  percentiles
machine       the processor and the libraries that were measured
report        results as a table, as JSON and as plots
charts        plots as SVG, without a plotting library

A comparison with diffusers is scripts/benchmark.py in the repository: this package never imports torch.
"""
