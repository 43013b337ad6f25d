"""Time and error of factoring one weight."""
