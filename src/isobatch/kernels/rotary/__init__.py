"""Rotary position embedding, the half-rotation form that Llama, Qwen and SmolLM share."""
