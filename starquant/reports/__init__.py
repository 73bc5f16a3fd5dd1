"""Tables from records; imports neither torch nor lm_eval."""
