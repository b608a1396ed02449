"""Checkpoints in one format for every engine: flat ranges in a safetensors file a rank, a manifest, a marker last."""
