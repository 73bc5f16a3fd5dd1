"""From a command line to cells, and from cells to Hydra's launchers. The only room that knows Hydra."""
