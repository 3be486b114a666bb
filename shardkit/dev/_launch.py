"""Turn this process into a server's: drop root, ask to die with the parent, then exec.

Run as a script by `processes.launcher`, never imported. It exists because these steps belong between fork and exec,
and Python code there (`preexec_fn`) can deadlock when the parent has threads.
Arguments: parent's pid, signal at the parent's death, uid or "-", gid or "-", then the command.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent: str, death_signal: str, uid: str, gid: str, *command: str) -> None:
    if uid != "-":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    os.umask(0o077)
    if sys.platform == "linux":
        # After setuid: a change of credentials clears it. It survives the exec.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("the process that asked for this server is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
