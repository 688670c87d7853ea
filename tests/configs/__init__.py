"""Tests of shoal.configs."""
