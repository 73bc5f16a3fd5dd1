"""`dry_run=true`: what a run would read, compute, write and take, told without loading its weights."""
