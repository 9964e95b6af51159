"""sd-verify: how closely a bundle computes what the checkpoint that it was made from computes in torch.

    probe      what is compared: prompt, seed, steps, size, timesteps
    reference  inputs and torch's outputs for a probe: computed now (torch_reference), or stored in the bundle
    compare    the runtime's outputs on the same inputs → rows
    limits     what each row is held to, by precision
    measures   the distance of two tensors
    report     the rows as a table and as JSON;  html, the same as a page with pictures and plots
    bisect     in which layer of a network the drift starts

Only torch_reference and bisect import torch; with stored reference tensors the runtime's libraries are enough.
"""
