"""Hand a checkpoint to transformers, sentence-transformers or ONNX: `python -m export.huggingface`."""
