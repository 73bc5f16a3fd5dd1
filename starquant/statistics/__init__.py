"""Bootstrap intervals of means and of paired differences."""
