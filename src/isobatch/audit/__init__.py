"""Row 6: what is promised, stated so that a machine can refute it."""
