"""Record a compression in MLflow; the only package of cur_modifier that imports mlflow.

Importing it imports neither mlflow nor matplotlib: both are optional, and both are imported by the
function that needs them. Figures are in :mod:`cur_modifier.tracking.figures`.
"""

from cur_modifier.tracking.environment import environment
from cur_modifier.tracking.page import Page
from cur_modifier.tracking.start import start_tracking
from cur_modifier.tracking.tracker import NullTracker, Tracker

__all__ = ["NullTracker", "Page", "Tracker", "environment", "start_tracking"]
