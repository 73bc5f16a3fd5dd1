"""The inside of the sandbox: limit this process, run the program, then write the token from standard input.

Started as a script in an isolated interpreter; imports nothing of starquant.
"""

import os
import resource
import sys


def main() -> None:
    """Arguments: program file, file for the token, CPU seconds, address space in MB, file size in MB, open files."""
    path, finished = sys.argv[1:3]
    seconds, memory_mb, file_mb, files = map(int, sys.argv[3:])
    token = sys.stdin.readline().strip()
    with open(path, encoding="utf-8") as stream:
        source = stream.read()
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})  # the purpose of this process
    with open(finished, "w", encoding="utf-8") as stream:
        stream.write(token)
    os._exit(0)


if __name__ == "__main__":
    main()
