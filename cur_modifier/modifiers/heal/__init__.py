"""The stage that trains what factors leave free."""
