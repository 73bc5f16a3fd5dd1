"""Where a run happens: device, processes, progress bars, log, tracker."""
