"""Requests, messages, scheduler, block pool, prefix cache, engine loop, worker loop and the executors' protocol."""
