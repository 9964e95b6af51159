"""sd-bench: what a bundle takes on this machine, in time and memory, and what it takes beside a peer.

stages    seconds of each stage of a picture, by percentile
batches   pictures a second by batch size
cold      a new process from its start to its first picture, and its peak memory
load      latency under requests that arrive whether or not the last one is done
peer      the same pictures by diffusers, in a process of its own
charts    plots as SVG, without a plotting library
"""
