"""Other programs' files: GGUF and Hugging Face, read and written."""
