"""torch helpers: processes, statistics, data order."""
