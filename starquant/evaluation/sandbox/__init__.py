"""Model-written programs, run against their tests behind what walls a system has; which of them hold is measured."""
