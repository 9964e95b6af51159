"""sd-bench: what a bundle takes on this machine, in time and memory, and what it takes beside a peer.

benchmark     the whole flow, in an order that spoils nothing
stages        seconds of each stage of a picture, and pictures a second by batch
processes     new processes from their start to a picture on disk; memory of theirs and of the GPU
load          latency under requests that arrive whether or not the last one is done
comparison    the same pictures by diffusers, in a process of its own (peer)
distribution  measurements by percentile
report        results as a table, as JSON and as plots
charts        plots as SVG, without a plotting library
"""
