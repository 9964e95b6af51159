"""One file a network: its module as it is traced, its tensors, its weights, what it is compared with.

    registry      the list of networks; a new one is a file here and a line there
    base          what a network's file says of it
    loading       a checkpoint's tensors in the libraries' models
    probes        inputs on which an autoencoder's values are measured
    export        one network → its graphs and weights in a bundle

`registry` and `probes` import neither torch nor diffusers; the networks' own files do.
"""
