"""Mesh and groups, collectives, sharded layers, pipeline transfer and the control channel."""
