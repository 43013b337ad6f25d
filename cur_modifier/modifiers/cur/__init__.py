"""The stage that replaces Linears by factors."""
