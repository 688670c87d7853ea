"""Command line, bring-up (in-process, local, torchrun), controller and supervision."""
