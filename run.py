"""`python run.py model=llada bits=w4a4`: the same as `starquant run model=llada bits=w4a4`."""

import sys

from starquant.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
