"""Helpers of several tests: access to libllama and CUDA, set-ups, programs that tests start."""
