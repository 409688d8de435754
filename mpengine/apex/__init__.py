"""apex for scripts that import it."""
