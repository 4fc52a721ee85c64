"""A checkpoint for transformers, sentence-transformers, ONNX: python -m export.huggingface."""
