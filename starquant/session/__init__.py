"""Where runs happen: device, processes, progress bars, log, tracker, and what runs of one process share."""
