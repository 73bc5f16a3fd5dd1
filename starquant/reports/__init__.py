"""Tables from records; imports neither torch nor lm_eval."""

import logging

# without a home folder it makes its list of fonts in a temporary one, which loses nothing and needs no three lines
logging.getLogger("matplotlib").setLevel(logging.ERROR)
