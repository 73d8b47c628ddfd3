"""The first half of an MLP: gates and ups, a product, and silu(gate) * up."""
