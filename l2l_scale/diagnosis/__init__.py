"""The doctor: what a rule does along a trajectory, what it is taught there, and what is wrong (floor 5)."""

from l2l_scale.diagnosis.diagnose import Diagnosis, diagnose
from l2l_scale.diagnosis.finding import Finding
from l2l_scale.diagnosis.subject import Subject

__all__ = ["Diagnosis", "Finding", "Subject", "diagnose"]
