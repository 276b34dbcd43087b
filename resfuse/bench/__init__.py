"""`python -m resfuse bench | verify | info`: eager, torch.compile and resfuse measured side by side in one run."""
