"""qatmoe: train Mixture-of-Experts language models on the exact numbers you deploy."""
