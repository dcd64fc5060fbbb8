"""What lies in a run folder beside its snapshots: training states, run state, statistics, events."""
