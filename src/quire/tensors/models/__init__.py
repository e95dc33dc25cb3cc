"""Any Hugging Face causal language model, run on a packed ragged batch with attention from outside: load.py, probe.py, model.py."""
