"""All limits of the doctor in one place: beyond which a number is worth a look, or a problem.

They are rules of thumb. Each is far from what rules that were trained well show.
"""

GATE_CLOSED, GATE_OPEN = 0.05, 0.95
"""A gate's activation below or above is saturated: its derivative is less than a fifth of the largest."""
GATES_LOOK, GATES_PROBLEM = 0.75, 0.99
"""Saturated share of all activations of a gate. A forget gate that is open, or an update gate of a GRU that
is high, keeps memory and is as it should be, up to GATES_PROBLEM."""
STILL = 1e-4
"""A unit whose activation varies less, over coordinates, tasks and inner steps, says nothing."""
STILL_LOOK, STILL_PROBLEM = 0.5, 1.0
"""Share of such units in a layer."""
HEAD_SATURATED = 0.99
"""|tanh(o₁)| of a TanhExp head above this."""
HEAD_LOOK = 0.9
"""Share of saturated outputs."""

DEAD_UPDATE = 1e-6
"""Largest update of a trajectory relative to the largest θ (root mean squares, median over tasks)."""
SLOW_FALL = 0.01
"""A rule is slow if half of the tasks lose less than this part of their first loss."""

DIVERGED_PROBLEM = 0.05
"""Share of tasks that diverge; any that does is worth a look."""

PHASE_LOOK, PHASE_PROBLEM = 30.0, 1e3
"""Meta-gradient of a window relative to that of the first."""
PHASE_SILENT = 1e-3
"""Meta-gradient of the weakest window relative to the strongest."""
NO_GRADIENT = 1e-12
"""Norm of the meta-gradient below which nothing reaches φ."""
NOISE_LOOK = 0.5
"""Signal-to-noise of a meta-step, if it is known so precisely."""

STEP_GAIN = 0.8
"""If twice or half the step brings the final loss below this part of itself, steps have the wrong size."""
EDGE_RATIO = 2.0
"""If a tenth more or less raises the final loss by this factor, the rule stands on an edge."""
SCALE_RATIO = 10.0
"""If a tenth or ten times the gradient raises the final loss by this factor, the rule needs its scale."""

CHAOS_LOOK, CHAOS_PROBLEM = 1e2, 1e5
"""Largest growth of a tiny perturbation of θ_0 (median over tasks) along the trajectory."""

FLAT_SLACK = 0.02
"""A metric is flat from where on it gains no more than this part of its whole gain."""
FLAT_SHARE = 0.5
"""Flat for more than this part of the run is worth a look."""
ENOUGH_VALIDATIONS = 6
"""With fewer nothing is said about the course."""
SKIPPED_LOOK, SKIPPED_PROBLEM = 0.001, 0.05
"""Share of meta-steps whose gradient was not finite."""
TRAIN_DIVERGED_LOOK, TRAIN_DIVERGED_PROBLEM = 0.01, 0.3
"""Share of slots that diverged in a window, over the last quarter of the run."""
CLIPPED_LOOK = 0.9
"""Share of logged meta-steps of the last quarter whose gradient was cut to less than a tenth."""

IMITATION_LOOK, IMITATION_PROBLEM = 0.3, 1.0
"""Squared error of a group's updates relative to the teacher's, mean over a tenth of the trajectory; without
updates it is 1."""
ASTRAY_LOOK = 1.25
"""Final loss of an imitator alone, relative to the teacher's."""
