"""What several tests share: libllama and CUDA for tests, set-ups, and programs that tests start."""
