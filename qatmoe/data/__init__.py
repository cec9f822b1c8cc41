"""Text to batches: `corpus` reads documents, `tokenizer` turns them into ids, `cache` keeps those, `batches` cuts them.

Entry points: `batches.load_data`, then `batches.make_train_iterator` and `batches.valid_batches`.
"""
