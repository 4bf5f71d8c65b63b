"""The league: every recipe at equal measured bytes on every workload, and what follows from it."""
