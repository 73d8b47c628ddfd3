"""silu(gate) * up, the gated activation of Llama-like models."""
