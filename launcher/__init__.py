"""Command line, bring-up (in-process, local, torchrun), router and supervision."""
