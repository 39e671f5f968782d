"""The science of FLUX.1: flow, transformer, autoencoder, solvers. Knows no files, network or command line."""
