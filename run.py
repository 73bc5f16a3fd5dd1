"""`python run.py model=llada bits=w4a4`: the same as `starquant run model=llada bits=w4a4`."""

import sys

if __name__ == "__main__":
    try:
        from starquant.__main__ import main  # here: Ctrl-C may come while it is imported

        code = main(["run", *sys.argv[1:]])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
