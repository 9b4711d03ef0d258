"""How much CPU time it takes to start a command, beside another checkout of the harness."""
