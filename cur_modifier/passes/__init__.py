"""Running a model over calibration data."""
