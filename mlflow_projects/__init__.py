"""MLflow projects around the stages, and the benchmarks: each folder is a package and a command."""
