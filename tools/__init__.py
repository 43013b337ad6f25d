"""What the demo, the projects and the tests use and the package does not."""
